"""ERNIE 4.5, dense: Llama whose neighbouring channels turn together."""

from __future__ import annotations

from ...family import Family

FAMILY = Family(
    "Ernie4_5ForCausalLM",
    {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    fixed={"rope_interleaved": True},
    neutral={"use_bias": (None, False)},
    rope_theta=500_000.0,
)
