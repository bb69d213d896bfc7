"""Gemma 3, the text model: Gemma 2 with norms of queries and keys, and another rotary base in layers with a window.

It has no soft-caps of the scores. Gemma 3 models that see images (model_type gemma3) hold this one inside another.
"""

from __future__ import annotations

from dataclasses import replace

from ...family import every
from .gemma2 import FAMILY as GEMMA2

FAMILY = replace(
    GEMMA2,
    architecture="Gemma3ForCausalLM",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    layer_types=lambda raw, layers: every(raw["sliding_window_pattern"])(raw, layers),
    fixed={**GEMMA2.fixed, "qk_norm": True},
    fields={"logit_softcap": "final_logit_softcapping"},
    neutral={**GEMMA2.neutral, "attn_logit_softcapping": (None,)},
    rope_theta=1_000_000.0,
    window_theta=("rope_local_base_freq", 10_000.0),
)
