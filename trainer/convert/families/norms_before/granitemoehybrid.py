"""Granite 4, its dense models: all layers are attention, and there are no experts.

Those with Mamba layers or experts have the same model_type; transformers computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chatmill.config import ConfigError

from ....model_config import ModelConfig
from ...values import integer
from .granite import FAMILY as GRANITE
from .granite import read_scales, write_scales


def _is_dense(raw: Mapping[str, Any]) -> bool:
    kinds = raw.get("layer_types") or raw.get("layers_block_type")
    dense = isinstance(kinds, list) and all(kind in ("attention", "full_attention") for kind in kinds)
    return dense and raw.get("num_local_experts") == 0


def _read(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    layers = int(raw["num_hidden_layers"])
    if not _is_dense(raw) or len(raw.get("layer_types") or raw["layers_block_type"]) != layers:
        raise ConfigError(f"{where}: layer_types must say attention for each of {layers} layers; Mamba is not supported.")
    positions = raw.get("position_embedding_type")
    if positions not in ("rope", "nope", None):
        raise ConfigError(f"{where}: position_embedding_type is {positions!r}; expected 'rope' or 'nope'.")
    return {
        **read_scales(raw, where),
        "intermediate_size": integer(raw, "shared_intermediate_size", where) or 1024,
        "nope_layers": None if positions == "rope" else tuple(range(layers)),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    nope = set(config.nope_layers or ()) >= set(range(config.layers))
    return write_scales(config) | {
        "shared_intermediate_size": config.intermediate_size,
        "position_embedding_type": "nope" if nope else "rope",
        "layer_types": ["full_attention"] * config.layers,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    }


FAMILY = replace(
    GRANITE,
    architecture="GraniteMoeHybridForCausalLM",
    defaults={"num_local_experts": 8, "intermediate_size": 11008},
    computes=_is_dense,
    read=_read,
    write=_write,
    fused={"shared_mlp.input_linear": ("mlp.gate", "mlp.up")},
    names={"mlp.down": "shared_mlp.output_linear"},
    extra={},
)
