"""Seed-OSS."""

from __future__ import annotations

from ...family import Family

FAMILY = Family(
    "SeedOssForCausalLM",
    {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True},
    qkv_bias="attention_bias",
    output_bias="attention_out_bias",
    extra={"mlp_bias": False, "residual_dropout": 0.0},
)
