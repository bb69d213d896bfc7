"""OLMo 3: OLMo 2 with a window in three of four layers; rotary scaling belongs to the fourth."""

from __future__ import annotations

from dataclasses import replace

from ...family import every
from .olmo2 import FAMILY as OLMO2

FAMILY = replace(
    OLMO2,
    architecture="Olmo3ForCausalLM",
    defaults={**OLMO2.defaults, "sliding_window": 4096},
    windows="types",
    layer_types=every(4),
    rope_theta=500_000.0,
    window_theta=("", 500_000.0),
)
