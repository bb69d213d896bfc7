"""Rotary settings of config.json <-> those of ModelConfig.

There are two spellings, `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5); both are read
and both are written. Where they differ, what transformers 5 takes is taken. Families whose layers with a window turn by angles
of their own nest the newer spelling by kind of layer: {"full_attention": {...}, "sliding_attention": {...}}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from chatmill.config import ConfigError

from ..model_config import ModelConfig, RopeScaling
from .family import Family
from .values import integer, number

FULL, SLIDING = "full_attention", "sliding_attention"


def read_rope(raw: Mapping[str, Any], family: Family, context: int, d_head: int, where: str) -> dict[str, Any]:
    """The fields rope_theta, rope_scaling, rotary_dim and window_rope_theta of ModelConfig, and context where it shrinks."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    found: dict[str, Any] = {}
    if family.window_theta is not None:
        found["window_rope_theta"], rope = _of_kinds(raw, family, where)
    elif not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ConfigError(f"{where}: rotary settings per layer type are not supported ({field} is nested).")
    place = f"{where}: {field}"
    found["rope_theta"] = number(rope, "rope_theta", place) or number(raw, "rope_theta", where) or family.rope_theta
    part = number(rope, "partial_rotary_factor", place)
    part = number(raw, "partial_rotary_factor", where) if part is None else part
    part = family.partial or 1.0 if part is None else part
    if part != 1.0 and family.partial is None:
        raise ConfigError(f"{where}: partial_rotary_factor is {part}, not 1; {family.architecture} turns all channels.")
    if not 0 < part <= 1:
        raise ConfigError(f"{where}: partial_rotary_factor is {part}; expected a part of 1.")
    turning = int(d_head * part)
    found["rotary_dim"] = None if turning == d_head else turning
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = family.rope_aliases.get(str(kind), kind)
    if kind == "default":
        return found
    if kind not in family.rope:
        supported = ", ".join(("default", *family.rope))
        raise ConfigError(f"{place}: rope_type {kind!r} is not supported. Supported for {family.architecture}: {supported}.")
    # beside the scaling it counts for more than inside it, as in transformers 5
    original = integer(raw, "original_max_position_embeddings", where)
    if kind == "linear" or original is None or family.window_theta is not None:
        original = integer(rope, "original_max_position_embeddings", place) or context
    if kind == "longrope":
        return found | _read_longrope(rope, context, original, place)
    return found | {"rope_scaling": _read_scaling(rope, kind, context, original, place)}


def _of_kinds(raw: Mapping[str, Any], family: Family, where: str) -> tuple[float, dict[str, Any]]:
    """The base of layers with a window, and the settings of the others."""
    nested = raw.get("rope_parameters") or {}
    kinds = (FULL, SLIDING)
    if not isinstance(nested, Mapping) or any(k not in kinds or not isinstance(v, Mapping | None) for k, v in nested.items()):
        raise ConfigError(
            f"{where}: rope_parameters of {family.architecture} hold one mapping for each of {' and '.join(kinds)}."
        )
    if (old := raw.get("rope_scaling")) is not None and not isinstance(old, Mapping):
        raise ConfigError(f"{where}: rope_scaling is {old!r}; expected a mapping.")
    full = {**(nested.get(FULL) or {}), **(old or {})}
    sliding = nested.get(SLIDING) or {}
    place = f"{where}: rope_parameters.{SLIDING}"
    if (kind := sliding.get("rope_type") or sliding.get("type") or "default") != "default":
        raise ConfigError(f"{place}: rope_type {kind!r} is not supported for layers with a window.")
    key, default = family.window_theta or ("", 0.0)
    theta = number(sliding, "rope_theta", place) or number(raw, key, where)
    both = number(raw, "rope_theta", where)
    if theta is None and key == "" and both is not None and both != default:
        raise ConfigError(
            f"{where}: rope_theta is {both}, which versions of transformers read differently for layers with a window."
        )
    return theta or default, full


def _read_scaling(rope: Mapping[str, Any], kind: str, context: int, original: int, place: str) -> dict[str, Any]:
    factor = number(rope, "factor", place)
    needed = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()
    missing = [key for key in needed if rope.get(key) is None]
    if factor is None and kind != "yarn":
        missing.insert(0, "factor")
    if missing:
        raise ConfigError(f"{place}: {', '.join(missing)} is missing; rope_type {kind!r} needs it.")
    scaling: dict[str, Any] = {"kind": kind, "factor": factor or context / original, "original_context": original}
    scaling |= {key: rope[key] for key in needed}
    if kind == "yarn":
        if rope.get("truncate", True) is False:
            raise ConfigError(f"{place}: yarn with truncate=false is not supported.")
        # 0 means the default, as in transformers
        scaling |= {key: value for key in ("beta_fast", "beta_slow") if (value := number(rope, key, place))}
        if (given := number(rope, "attention_factor", place)) is not None:
            scaling["attention_factor"] = given
        mscale, everywhere = number(rope, "mscale", place), number(rope, "mscale_all_dim", place)
        if given is None and mscale and everywhere:
            scaling["attention_factor"] = _mscale(scaling["factor"], mscale) / _mscale(scaling["factor"], everywhere)
    return scaling


def _read_longrope(rope: Mapping[str, Any], context: int, original: int, place: str) -> dict[str, Any]:
    """Only texts within the original context, whose angles do not depend on their length: the model's context shrinks to it."""
    factors = {}
    for key in ("short_factor", "long_factor"):
        value = rope.get(key)
        if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
            raise ConfigError(f"{place}: {key} is {value!r:.60}; longrope needs a list of numbers.")
        factors[key] = tuple(value)
    scaling = {"kind": "longrope", "factor": context / original, "original_context": original, **factors}
    attention, factor = number(rope, "attention_factor", place), number(rope, "factor", place)
    if attention is None and factor is not None and factor != context / original:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if attention is not None:
        scaling["attention_factor"] = attention
    return {"rope_scaling": scaling, "context": min(context, original)}


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The rotary keys of a config.json, and max_position_embeddings."""
    rope: dict[str, Any] = {"rope_type": "default"} if config.rope_scaling is None else _rope_dict(config.rope_scaling)
    if family.partial is not None:
        rope["partial_rotary_factor"] = (config.rotary_dim or config.d_head) / config.d_head
    raw: dict[str, Any] = {"max_position_embeddings": config.context, "rope_theta": config.rope_theta}
    raw["rope_scaling"] = None if config.rope_scaling is None else rope
    raw["rope_parameters"] = {**rope, "rope_theta": config.rope_theta}
    if family.partial is not None:
        raw["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if (scaling := config.rope_scaling) is not None and scaling.kind == "longrope":
        raw["max_position_embeddings"] = round(scaling.factor * scaling.original_context)
        raw["original_max_position_embeddings"] = scaling.original_context
    if family.window_theta is not None:
        theta = config.window_rope_theta or config.rope_theta
        raw["rope_parameters"] = {FULL: raw["rope_parameters"], SLIDING: {"rope_type": "default", "rope_theta": theta}}
        if key := family.window_theta[0]:
            raw[key] = theta
    return raw


def _rope_dict(scaling: RopeScaling) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return rope
    rope["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        return rope | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "longrope":
        rope |= {"short_factor": list(scaling.short_factor or ()), "long_factor": list(scaling.long_factor or ())}
        return rope if scaling.attention_factor is None else rope | {"attention_factor": scaling.attention_factor}
    rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return rope if scaling.attention_factor is None else rope | {"attention_factor": scaling.attention_factor}
