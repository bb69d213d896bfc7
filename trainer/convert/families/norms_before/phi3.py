"""Phi-3 and Phi-4: the matrices of attention and feed-forward lie fused in the folder.

Its only rotary scaling, longrope, takes other angles for texts beyond the original context: those of one text would depend on
its length, which a cache that grows cannot follow. The context of an import is the original one (4,096 tokens of Phi-4-mini).
"""

from __future__ import annotations

from ...family import Family

FAMILY = Family(
    "Phi3ForCausalLM",
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    windows="all",
    rope=("longrope",),
    rope_aliases={"su": "longrope", "yarn": "longrope"},
    partial=1.0,
    fused={
        "self_attn.qkv_proj": ("attention.q", "attention.k", "attention.v"),
        "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    },
    extra={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
)
