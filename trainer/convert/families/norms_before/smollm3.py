"""SmolLM3: some layers have no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatmill.config import ConfigError

from ....model_config import ModelConfig
from ...family import Family
from ...values import integer


def _read_layers(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    turns, layers = raw.get("no_rope_layers"), int(raw["num_hidden_layers"])
    if turns is None:
        interval = integer(raw, "no_rope_layer_interval", where) or 4
        turns = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(turns, list) or len(turns) != layers or any(value not in (0, 1) for value in turns):
        raise ConfigError(f"{where}: no_rope_layers must have {layers} entries, each 1 (with positions) or 0.")
    return {"nope_layers": tuple(layer for layer, value in enumerate(turns) if not value) or None}


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    return {"no_rope_layers": [int(layer not in (config.nope_layers or ())) for layer in range(config.layers)]}


def _default_kinds(raw: Mapping[str, Any], layers: int) -> list[str]:
    nope = _read_layers(raw, "config.json")["nope_layers"] or ()
    return ["sliding_attention" if layer in nope else "full_attention" for layer in range(layers)]


FAMILY = Family(
    "SmolLM3ForCausalLM",
    {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    windows="layers",
    layer_types=_default_kinds,
    read=_read_layers,
    write=_write_layers,
    rope_theta=2_000_000.0,
    extra={"mlp_bias": False},
)
