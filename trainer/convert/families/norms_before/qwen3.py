"""Qwen3, dense."""

from __future__ import annotations

from ...family import QWEN, Family

FAMILY = Family(
    "Qwen3ForCausalLM",
    {**QWEN, "head_dim": 128},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    fixed={"qk_norm": True},
    windows="layers",
    gguf="qwen3",
)
