"""Granite 3, dense: Llama with scales on embeddings, scores, branches and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....model_config import ModelConfig
from ...family import Family
from ...values import number

KEYS = {
    "embedding_scale": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_divisor": "logits_scaling",
}


def read_scales(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The four scales, each 1 where config.json does not say."""
    found = {ours: number(raw, key, where) for ours, key in KEYS.items()}
    return {ours: 1.0 if value is None else value for ours, value in found.items()}


def write_scales(config: ModelConfig) -> dict[str, Any]:
    """The keys of the four scales."""
    values = {key: getattr(config, ours) for ours, key in KEYS.items()}
    return values | {"attention_multiplier": config.attention_scale or config.d_head**-0.5}


FAMILY = Family(
    "GraniteForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    read=read_scales,
    write=write_scales,
    extra={"mlp_bias": False},
)
