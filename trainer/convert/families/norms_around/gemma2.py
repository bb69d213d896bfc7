"""Gemma 2: norms around each branch, soft-caps, scaled embeddings, a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....model_config import ModelConfig
from ...family import Family
from ...values import number


def read_scales(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The scale of the scores, and that of the embeddings, which the width fixes."""
    scalar = number(raw, "query_pre_attn_scalar", where) or 256.0
    return {"attention_scale": scalar**-0.5, "embedding_scale": raw["hidden_size"] ** 0.5}


def write_scales(config: ModelConfig) -> dict[str, Any]:
    """query_pre_attn_scalar, a whole number."""
    return {"query_pre_attn_scalar": round((config.attention_scale or config.d_head**-0.5) ** -2)}


FAMILY = Family(
    "Gemma2ForCausalLM",
    {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "tie_word_embeddings": True,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    windows="types",
    layer_types=lambda raw, layers: ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
    fixed={"norms": "around", "norm_offset": 1},
    fields={"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
    read=read_scales,
    write=write_scales,
    neutral={"use_bidirectional_attention": (None, False)},
    activation=("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}),
    names={
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
