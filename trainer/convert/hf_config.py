"""config.json of Hugging Face folders <-> ModelConfig.

    config = read_hf_config(json.loads(text), where)       # ConfigError for what the decoder cannot compute exactly
    raw = write_hf_config(config, dtype="bfloat16")

Families: llama (Llama 2, Llama 3.x, SmolLM2 and everything saved as LlamaForCausalLM), mistral, qwen2, qwen3.
Rotary settings have two spellings, `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5); both
are read and both are written. An unknown setting that changes the numbers is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatmill.config import ConfigError, validate

from ...data.tokenizer.generation_settings import as_setting, end_ids
from ..model_config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class Family:
    """What a Hugging Face architecture fixes, and its defaults for keys that config.json may omit."""

    architecture: str
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / heads
    sliding_window: int | None = None
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", kv_heads=8, sliding_window=4096),
    "qwen2": Family("Qwen2ForCausalLM", kv_heads=32),
    "qwen3": Family("Qwen3ForCausalLM", kv_heads=32, head_dim=128, qk_norm=True),
}
LAYER_KINDS = {"full_attention": False, "sliding_attention": True}


def read_hf_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape described by a config.json. where: its path, for messages."""
    family = raw.get("model_type")
    known = ", ".join(f.architecture for f in FAMILIES.values())
    if family not in FAMILIES:
        raise ConfigError(f"{where}: model_type {family!r} is not supported.\nSupported architectures: {known}.")
    architectures = raw.get("architectures") or [FAMILIES[family].architecture]
    if FAMILIES[family].architecture not in architectures:
        raise ConfigError(f"{where}: architecture {architectures[0]!r} is not supported.\nSupported architectures: {known}.")
    _refuse_unsupported(raw, where)
    defaults = FAMILIES[family]

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ConfigError(f"{where}: {key!r} is missing; it must state the shape of the model.")
        return raw[key]

    heads, layers = need("num_attention_heads"), need("num_hidden_layers")
    head_dim = raw.get("head_dim", defaults.head_dim)
    context = raw.get("max_position_embeddings") or 2048
    theta, scaling = _read_rope(raw, context, where)
    window, windowed = _read_window(raw, family, layers, where)
    attention_bias = bool(raw.get("attention_bias", False))
    return validate(
        ModelConfig,
        {
            "family": family,
            "vocab_size": need("vocab_size"),
            "hidden_size": need("hidden_size"),
            "intermediate_size": need("intermediate_size"),
            "layers": layers,
            "heads": heads,
            "kv_heads": raw.get("num_key_value_heads", defaults.kv_heads) or heads,
            "head_dim": None if head_dim == need("hidden_size") / heads else head_dim,  # one spelling for one shape
            "context": context,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_eps": raw.get("rms_norm_eps", 1e-6),
            "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
            "qkv_bias": family == "qwen2" or (family != "mistral" and attention_bias),
            "output_bias": family in ("llama", "qwen3") and attention_bias,
            "qk_norm": defaults.qk_norm,
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
    _refuse_unfitting(config)
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[config.family].architecture],
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
    if config.family in ("llama", "qwen3"):
        raw["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        raw["mlp_bias"] = False
    if config.family == "mistral":
        raw["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
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


def _read_rope(raw: Mapping[str, Any], context: int, where: str) -> tuple[float, dict[str, Any] | None]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ConfigError(f"{where}: rotary settings per layer type are not supported (rope_parameters is nested).")
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is not 1; the decoder turns all channels of a head.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(f"{where}: rope_type {kind!r} is not supported. Supported: default, linear, llama3, yarn.")
    original = rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or context
    scaling: dict[str, Any] = {"kind": kind, "factor": rope.get("factor") or context / original, "original_context": original}
    if kind == "llama3":
        scaling |= {key: rope[key] for key in ("low_freq_factor", "high_freq_factor") if rope.get(key) is not None}
    if kind == "yarn":
        if rope.get("truncate", True) is False:
            raise ConfigError(f"{where}: yarn with truncate=false is not supported.")
        scaling |= {key: rope[key] for key in ("beta_fast", "beta_slow", "attention_factor") if rope.get(key) is not None}
        if "attention_factor" not in scaling and rope.get("mscale") and rope.get("mscale_all_dim"):
            scaling["attention_factor"] = _mscale(scaling["factor"], rope["mscale"]) / _mscale(
                scaling["factor"], rope["mscale_all_dim"]
            )
    return theta, scaling


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _read_window(raw: Mapping[str, Any], family: str, layers: int, where: str) -> tuple[int | None, tuple[int, ...] | None]:
    """The sliding window in tokens and the layers that have it (None: all of them)."""
    window = raw.get("sliding_window", FAMILIES[family].sliding_window)
    if family == "llama" or window is None:
        return None, None
    if family == "mistral":
        return window, None
    if not raw.get("use_sliding_window", False):
        return None, None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        return _only(window, tuple(range(first, layers)))
    if len(kinds) != layers or not set(kinds) <= set(LAYER_KINDS):
        raise ConfigError(
            f"{where}: layer_types must have {layers} entries, each {' or '.join(LAYER_KINDS)}; "
            f"got {len(kinds)}: {', '.join(sorted(set(map(str, kinds))))}."
        )
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


def _refuse_unfitting(config: ModelConfig) -> None:
    """The error for a config that no Hugging Face architecture of the family can compute; it names the field."""
    windows = [config.window_of(layer) for layer in range(config.layers)]
    problems = []
    if config.attention_softcap or config.logit_softcap:
        problems.append("a soft-cap on attention or logits has no counterpart in any of them")
    if config.family == "llama" and any(windows):
        problems.append("sliding_window needs family mistral, qwen2 or qwen3")
    if config.family == "mistral" and any(windows) and not all(windows):
        problems.append("mistral has its window on all layers or on none")
    if config.qk_norm != FAMILIES[config.family].qk_norm:
        problems.append("qk_norm belongs to family qwen3, and only there")
    expected = {"llama": config.output_bias, "qwen3": config.output_bias, "mistral": False, "qwen2": True}[config.family]
    if config.qkv_bias != expected or (config.output_bias and config.family in ("mistral", "qwen2")):
        problems.append("biases: llama and qwen3 have qkv_bias = output_bias, mistral has none, qwen2 has qkv_bias alone")
    if problems:
        raise ConfigError(
            f"this model cannot be exported as {FAMILIES[config.family].architecture}: " + "; ".join(problems) + "."
        )
