"""OLMo 2: what a branch adds is normed, not what it reads; one norm over all queries of a token, one over all keys."""

from __future__ import annotations

from ...family import Family

FAMILY = Family(
    "Olmo2ForCausalLM",
    {"rms_norm_eps": 1e-5},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    fixed={"norms": "after", "qk_norm": True, "qk_norm_over": "projection"},
    names={"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
)
