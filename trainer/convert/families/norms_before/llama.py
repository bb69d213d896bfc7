"""Llama 2, 3.x, SmolLM2, Yi, TinyLlama and everything else saved as LlamaForCausalLM."""

from __future__ import annotations

from ...family import Family

FAMILY = Family(
    "LlamaForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    extra={"mlp_bias": False},
    gguf="llama",
)
