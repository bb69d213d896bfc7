"""config.json of Hugging Face folders <-> ModelConfig.

    config = read_hf_config(json.loads(text), where)       # ConfigError for what the decoder cannot compute exactly
    raw = write_hf_config(config, dtype="bfloat16")

Families: family.py (`llama` is also SmolLM2, Yi and everything else saved as LlamaForCausalLM).
Rotary settings have two spellings, `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5); both
are read and both are written; where they differ, what transformers 5 takes is taken. An unknown setting that changes the
numbers is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from chatmill.config import ConfigError, validate

from ...data.tokenizer.generation_settings import as_setting, end_ids
from ..model_config import ModelConfig, RopeScaling, family_files
from .family import Family, families, family_of, known_architectures

LAYER_KINDS = {"full_attention": False, "sliding_attention": True}


def read_hf_config(raw: Mapping[str, Any], where: str, held: Collection[str] | None = None) -> ModelConfig:
    """The shape described by a config.json. where: its path, for messages.

    held: names of the folder's tensors; where config.json does not say whether the embeddings are tied, they do.
    """
    name = raw.get("model_type")
    known = known_architectures()
    if not isinstance(name, str) or name not in family_files():
        found = "it names no model_type" if name is None else f"model_type {name!r} is not supported"
        raise ConfigError(f"{where}: {found}.\nSupported architectures: {known}.")
    family = family_of(name)
    architectures = raw.get("architectures") or [family.architecture]
    if not isinstance(architectures, list) or family.architecture not in architectures:
        found = architectures[0] if isinstance(architectures, list) else architectures
        raise ConfigError(f"{where}: architecture {found!r} is not supported.\nSupported architectures: {known}.")
    _refuse_unsupported(raw, where)
    raw = {**family.defaults, **raw}

    def need(key: str) -> int:
        found = _integer(raw, key, where)
        if found is None:
            raise ConfigError(f"{where}: {key!r} is missing; it must state the shape of the model.")
        return found

    def bias(rule: bool | str) -> bool:
        return _flag(raw, rule, where) if isinstance(rule, str) else rule

    heads, layers, hidden = need("num_attention_heads"), need("num_hidden_layers"), need("hidden_size")
    head_dim = _integer(raw, "head_dim", where)
    context = _integer(raw, "max_position_embeddings", where) or 2048
    theta, scaling = _read_rope(raw, family, context, where)
    window, windowed = _read_window(raw, family, layers, where)
    untold = raw.get("tie_word_embeddings") is None and held is not None
    return validate(
        ModelConfig,
        {
            "family": name,
            "vocab_size": need("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": need("intermediate_size"),
            "layers": layers,
            "heads": heads,
            "kv_heads": _integer(raw, "num_key_value_heads", where) or heads,
            "head_dim": None if head_dim and head_dim * heads == hidden else head_dim,  # one spelling for one shape
            "context": context,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_eps": raw.get("rms_norm_eps", 1e-6),
            "tied_embeddings": "lm_head.weight" not in held
            if untold and held is not None
            else _flag(raw, "tie_word_embeddings", where),
            "qkv_bias": bias(family.qkv_bias),
            "output_bias": bias(family.output_bias),
            "qk_norm": family.qk_norm,
            "sliding_window": window,
            "sliding_layers": windowed,
            "initializer_range": raw.get("initializer_range") or 0.02,
            "bos_token_id": raw.get("bos_token_id"),
            "eos_token_id": as_setting(end_ids(raw, where)),
            "pad_token_id": raw.get("pad_token_id"),
        },
        where,
    )


def write_hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json for transformers 4 and 5. dtype: `float32`, `bfloat16` or `float16`. ConfigError if no architecture fits."""
    family = family_of(config.family)
    _refuse_unfitting(config, family)
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    rope = {"rope_type": "default"} if config.rope_scaling is None else _rope_dict(config.rope_scaling)
    raw["rope_theta"] = config.rope_theta
    raw["rope_scaling"] = None if config.rope_scaling is None else rope
    raw["rope_parameters"] = {**rope, "rope_theta": config.rope_theta}
    biases = ((family.qkv_bias, config.qkv_bias), (family.output_bias, config.output_bias))
    raw |= {key: value for key, value in biases if isinstance(key, str)} | dict(family.extra)
    if family.windows == "all":
        raw["sliding_window"] = config.sliding_window
    if family.windows == "layers":
        windows = [config.window_of(layer) is not None for layer in range(config.layers)]
        raw["use_sliding_window"] = any(windows)
        raw["sliding_window"] = config.sliding_window if any(windows) else None
        # transformers 4 before 4.52 knows only this rule: full attention below max_window_layers, windows from there on
        raw["max_window_layers"] = windows.index(True) if any(windows) else config.layers
        raw["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in windows]
    return raw


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act {activation!r}; the decoder computes SwiGLU, so it must be 'silu'.")
    if raw.get("mlp_bias"):
        raise ConfigError(f"{where}: mlp_bias is true; feed-forward biases are not supported.")
    if raw.get("quantization_config"):
        raise ConfigError(f"{where}: the weights are quantised. Import the unquantised model (bf16, fp16 or fp32).")
    if raw.get("num_experts") or raw.get("num_local_experts"):
        raise ConfigError(f"{where}: mixture-of-experts models are not supported.")


def _read_rope(raw: Mapping[str, Any], family: Family, context: int, where: str) -> tuple[float, dict[str, Any] | None]:
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ConfigError(f"{where}: rotary settings per layer type are not supported ({field} is nested).")
    place = f"{where}: {field}"
    theta = _number(rope, "rope_theta", place) or _number(raw, "rope_theta", where) or 10_000.0
    part = _number(rope, "partial_rotary_factor", place) or _number(raw, "partial_rotary_factor", where) or 1.0
    if part != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is {part}, not 1; the decoder turns all channels of a head.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in family.rope:
        supported = ", ".join(("default", *family.rope))
        raise ConfigError(f"{place}: rope_type {kind!r} is not supported. Supported for {family.architecture}: {supported}.")
    # beside the scaling it counts for more than inside it, as in transformers 5
    original = _integer(raw, "original_max_position_embeddings", where)
    if kind == "linear" or original is None:
        original = _integer(rope, "original_max_position_embeddings", place) or context
    factor = _number(rope, "factor", place)
    needed = {"linear": (), "llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ()}[kind]
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
        scaling |= {key: value for key in ("beta_fast", "beta_slow") if (value := _number(rope, key, place))}
        if (given := _number(rope, "attention_factor", place)) is not None:
            scaling["attention_factor"] = given
        mscale, everywhere = _number(rope, "mscale", place), _number(rope, "mscale_all_dim", place)
        if given is None and mscale and everywhere:
            scaling["attention_factor"] = _mscale(scaling["factor"], mscale) / _mscale(scaling["factor"], everywhere)
    return theta, scaling


def _number(raw: Mapping[str, Any], key: str, where: str) -> float | None:
    """A finite number, or None where the key is missing or null. Raises ConfigError for anything else."""
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {key} is {value!r}; expected a number.")
    return float(value)


def _integer(raw: Mapping[str, Any], key: str, where: str) -> int | None:
    """A whole number above 0, or None where the key is missing or null. Raises ConfigError for anything else."""
    value = _number(raw, key, where)
    if value is not None and (value != int(value) or value <= 0):
        raise ConfigError(f"{where}: {key} is {raw[key]!r}; expected a whole number above 0.")
    return None if value is None else int(raw[key])


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    """True or false; false where the key is missing or null. Raises ConfigError for anything else, such as "false"."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} is {value!r}; expected true or false.")
    return bool(value)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _read_window(raw: Mapping[str, Any], family: Family, layers: int, where: str) -> tuple[int | None, tuple[int, ...] | None]:
    """The sliding window in tokens and the layers that have it (None: all of them)."""
    if family.windows == "none" or (family.windows == "layers" and not _flag(raw, "use_sliding_window", where)):
        return None, None
    window = _integer(raw, "sliding_window", where)
    if window is None or family.windows == "all":
        return window, None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = _number(raw, "max_window_layers", where)
        return _only(window, tuple(range(int(first or 0), min(layers, 1 << 16))))
    known = isinstance(kinds, list) and all(isinstance(kind, str) and kind in LAYER_KINDS for kind in kinds)
    if not known or len(kinds) != layers:
        got = f"{len(kinds)}: {', '.join(sorted(set(map(str, kinds))))}" if isinstance(kinds, list) else repr(kinds)
        raise ConfigError(f"{where}: layer_types must have {layers} entries, each {' or '.join(LAYER_KINDS)}; got {got}.")
    return _only(window, tuple(i for i, kind in enumerate(kinds) if LAYER_KINDS[kind]))


def _only(window: int, layers: tuple[int, ...]) -> tuple[int | None, tuple[int, ...] | None]:
    return (window, layers) if layers else (None, None)


def _rope_dict(scaling: RopeScaling) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return rope
    rope["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        return rope | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return rope if scaling.attention_factor is None else rope | {"attention_factor": scaling.attention_factor}


def _refuse_unfitting(config: ModelConfig, family: Family) -> None:
    """The error for a config that no Hugging Face architecture of the family can compute; it names the field."""
    windows = [config.window_of(layer) for layer in range(config.layers)]
    problems = []
    if config.attention_softcap or config.logit_softcap:
        problems.append("a soft-cap on attention or logits has no counterpart in any of them")
    if family.windows == "none" and any(windows):
        able = [name for name, other in families().items() if other.windows != "none"]
        problems.append(f"sliding_window needs family {', '.join(able[:-1])} or {able[-1]}")
    if family.windows == "all" and any(windows) and not all(windows):
        problems.append(f"{config.family} has its window on all layers or on none")
    if config.qk_norm != family.qk_norm:
        problems.append("qk_norm belongs to family qwen3, and only there")
    if config.rope_scaling is not None and config.rope_scaling.kind not in family.rope:
        problems.append(f"{config.family} has no rope_scaling of kind {config.rope_scaling.kind}")
    rules = (family.qkv_bias, family.output_bias)
    biases = (config.qkv_bias, config.output_bias)
    fixed = any(isinstance(rule, bool) and rule != has for rule, has in zip(rules, biases, strict=True))
    if fixed or (rules[0] == rules[1] and biases[0] != biases[1]):
        allowed = {True: "always", False: "never"}
        said = [
            f"{name} {allowed[rule] if isinstance(rule, bool) else f'as {rule} says'}"
            for name, rule in zip(("qkv_bias", "output_bias"), rules, strict=True)
        ]
        problems.append(f"biases: {config.family} has {' and '.join(said)}")
    if problems:
        raise ConfigError(f"this model cannot be exported as {family.architecture}: " + "; ".join(problems) + ".")
