"""EXAONE 4: norms as in OLMo 2, but one per head; where some layers have a window, those without have no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...family import Family, every


def _kinds(raw: Mapping[str, Any], layers: int) -> list[str]:
    interval = raw.get("sliding_window_pattern")
    return every(interval)(raw, layers) if isinstance(interval, int) and interval > 0 else ["full_attention"] * layers


def _read(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    if raw.get("sliding_window") is None:
        return {"nope_layers": None}
    layers = int(raw["num_hidden_layers"])
    kinds = raw.get("layer_types") or _kinds(raw, layers)
    return {"nope_layers": tuple(layer for layer, kind in enumerate(kinds) if kind != "sliding_attention") or None}


FAMILY = Family(
    "Exaone4ForCausalLM",
    {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
    windows="types",
    layer_types=_kinds,
    fixed={"norms": "after", "qk_norm": True},
    read=_read,
    names={"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
)
