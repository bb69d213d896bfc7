"""Mistral 7B and Mistral Small, with the sliding window of the first or without."""

from __future__ import annotations

from ...family import Family

FAMILY = Family(
    "MistralForCausalLM",
    {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    windows="all",
    gguf="llama",
)
