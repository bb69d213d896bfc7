"""GLM-4 of 2025 (model_type glm4), dense: neighbouring channels turn together, and by default only half of them."""

from __future__ import annotations

from ...family import Family

FAMILY = Family(
    "Glm4ForCausalLM",
    {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    qkv_bias="attention_bias",
    fixed={"norms": "around", "rope_interleaved": True},
    partial=0.5,
    fused={"mlp.gate_up_proj": ("mlp.gate", "mlp.up")},
    names={"attention_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"},
)
