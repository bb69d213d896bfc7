"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from ...family import QWEN, Family

FAMILY = Family("Qwen2ForCausalLM", QWEN, qkv_bias=True, windows="layers", gguf="qwen2")
