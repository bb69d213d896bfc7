"""config.json of Hugging Face folders <-> ModelConfig.

    config = read_hf_config(json.loads(text), where)       # ConfigError for what the decoder cannot compute exactly
    raw = write_hf_config(config, dtype="bfloat16")

Families: family.py (`llama` is also SmolLM2, Yi and everything else saved as LlamaForCausalLM).
An unknown setting that changes the numbers is refused, never ignored, and so is an export that would lose one: what is written
is read back and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from chatmill.config import ConfigError, validate

from ...data.tokenizer.generation_settings import as_setting, end_ids
from ..model_config import ModelConfig, family_files
from .family import Family, families, family_of, known_architectures
from .hf_rotary import read_rope, write_rope
from .values import flag, integer, number

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
    _refuse_unsupported(raw, family, where)
    raw = {**family.defaults, **raw}

    def need(key: str) -> int:
        found = integer(raw, key, where)
        if found is None:
            raise ConfigError(f"{where}: {key!r} is missing; it must state the shape of the model.")
        return found

    def bias(rule: bool | str) -> bool:
        return flag(raw, rule, where) if isinstance(rule, str) else rule

    heads, layers, hidden = need("num_attention_heads"), need("num_hidden_layers"), need("hidden_size")
    head_dim = integer(raw, "head_dim", where)
    context = integer(raw, "max_position_embeddings", where) or 2048
    window, windowed = _read_window(raw, family, layers, where)
    untold = raw.get("tie_word_embeddings") is None and held is not None
    fields: dict[str, Any] = {
        "family": name,
        "vocab_size": need("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": need("intermediate_size"),
        "layers": layers,
        "heads": heads,
        "kv_heads": integer(raw, "num_key_value_heads", where) or heads,
        "head_dim": None if head_dim and head_dim * heads == hidden else head_dim,  # one spelling for one shape
        "context": context,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tied_embeddings": "lm_head.weight" not in held
        if untold and held is not None
        else flag(raw, "tie_word_embeddings", where),
        "qkv_bias": bias(family.qkv_bias),
        "output_bias": bias(family.output_bias),
        "activation": _read_activation(raw, family, where),
        "sliding_window": window,
        "sliding_layers": windowed,
        "initializer_range": raw.get("initializer_range") or 0.02,
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": as_setting(end_ids(raw, where)),
        "pad_token_id": raw.get("pad_token_id"),
    }
    fields |= read_rope(raw, family, context, head_dim or hidden // heads, where)
    fields |= {ours: number(raw, key, where) for ours, key in family.fields.items() if raw.get(key) is not None}
    fields |= family.fixed
    if family.read is not None:
        fields |= family.read(raw, where)
    if window is None:  # no layer would use it
        fields["window_rope_theta"] = None
    return validate(ModelConfig, fields, where)


def write_hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json for transformers 4 and 5. dtype: `float32`, `bfloat16` or `float16`. ConfigError if no architecture fits."""
    family = family_of(config.family)
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
        family.activation[0]: next(
            (theirs for theirs, ours in family.activation[1].items() if ours == config.activation), None
        ),
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
    raw |= write_rope(config, family)
    biases = ((family.qkv_bias, config.qkv_bias), (family.output_bias, config.output_bias))
    raw |= {key: value for key, value in biases if isinstance(key, str)} | dict(family.extra)
    raw |= {key: getattr(config, ours) for ours, key in family.fields.items()}
    windows = [config.window_of(layer) is not None for layer in range(config.layers)]
    if family.windows == "all":
        raw["sliding_window"] = config.sliding_window
    if family.windows == "types":  # transformers wants a number, even where no layer uses it
        raw["sliding_window"] = config.sliding_window or family.defaults.get("sliding_window")
        raw["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in windows]
    if family.windows == "layers":
        raw["use_sliding_window"] = any(windows)
        raw["sliding_window"] = config.sliding_window if any(windows) else None
        # transformers 4 before 4.52 knows only this rule: full attention below max_window_layers, windows from there on
        raw["max_window_layers"] = windows.index(True) if any(windows) else config.layers
        raw["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in windows]
    if family.write is not None:
        raw |= family.write(config)
    _refuse_loss(config, raw, family)
    return raw


def _refuse_unsupported(raw: Mapping[str, Any], family: Family, where: str) -> None:
    if raw.get("mlp_bias"):
        raise ConfigError(f"{where}: mlp_bias is true; feed-forward biases are not supported.")
    if raw.get("quantization_config"):
        raise ConfigError(f"{where}: the weights are quantised. Import the unquantised model (bf16, fp16 or fp32).")
    if raw.get("num_experts") or raw.get("num_local_experts"):
        raise ConfigError(f"{where}: mixture-of-experts models are not supported.")
    for key, values in family.neutral.items():
        if key in raw and raw[key] not in values:
            names = " or ".join(map(repr, values))
            raise ConfigError(
                f"{where}: {key} is {raw[key]!r}, which is not supported for {family.architecture}: only {names} is."
            )


def _read_activation(raw: Mapping[str, Any], family: Family, where: str) -> str:
    key, names = family.activation
    found = raw.get(key, next(iter(names)))
    if not isinstance(found, str) or found not in names:
        raise ConfigError(
            f"{where}: {key} {found!r}; for {family.architecture} the decoder computes {next(iter(names))!r} only."
        )
    return names[found]


def _read_window(raw: Mapping[str, Any], family: Family, layers: int, where: str) -> tuple[int | None, tuple[int, ...] | None]:
    """The sliding window in tokens and the layers that have it (None: all of them)."""
    if family.windows == "none" or (family.windows == "layers" and not flag(raw, "use_sliding_window", where)):
        return None, None
    window = integer(raw, "sliding_window", where)
    if family.windows == "all":
        return window, None
    kinds = raw.get("layer_types")
    if kinds is None and family.layer_types is not None and layers <= 1 << 16:
        kinds = family.layer_types(raw, layers)
    if window is None:
        if family.windows == "types" and isinstance(kinds, list) and "sliding_attention" in kinds:
            raise ConfigError(f"{where}: sliding_window is missing, yet layer_types name layers that have one.")
        return None, None
    if kinds is None:
        first = number(raw, "max_window_layers", where)
        return _only(window, tuple(range(int(first or 0), min(layers, 1 << 16))))
    known = isinstance(kinds, list) and all(isinstance(kind, str) and kind in LAYER_KINDS for kind in kinds)
    if not known or len(kinds) != layers:
        got = f"{len(kinds)}: {', '.join(sorted(set(map(str, kinds))))}" if isinstance(kinds, list) else repr(kinds)
        raise ConfigError(f"{where}: layer_types must have {layers} entries, each {' or '.join(LAYER_KINDS)}; got {got}.")
    return _only(window, tuple(i for i, kind in enumerate(kinds) if LAYER_KINDS[kind]))


def _only(window: int, layers: tuple[int, ...]) -> tuple[int | None, tuple[int, ...] | None]:
    return (window, layers) if layers else (None, None)


def _effective(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config, those that can be spelled in several ways in one of them."""
    found = config.model_dump()
    windows = tuple(config.window_of(layer) for layer in range(config.layers))
    own = config.window_rope_theta or (config.rope_theta if config.rope_scaling is None else None)
    return found | {
        "head_dim": config.d_head,
        "rotary_dim": config.rotary_dim or config.d_head,
        "attention_scale": config.attention_scale or config.d_head**-0.5,
        "sliding_window": next(filter(None, windows), None),
        "sliding_layers": tuple(layer for layer, window in enumerate(windows) if window),
        "window_rope_theta": own if any(windows) else None,
        "nope_layers": tuple(sorted(set(config.nope_layers or ()) & set(range(config.layers)))),
        "qk_norm_over": config.qk_norm_over if config.qk_norm else "head",
    }


def _refuse_loss(config: ModelConfig, raw: Mapping[str, Any], family: Family) -> None:
    """Read the written config.json back: what it cannot say would be lost. Raises ConfigError naming the fields."""
    try:
        back, asked = _effective(read_hf_config(raw, "its config.json")), _effective(config)
    except ConfigError as error:
        raise ConfigError(f"this model cannot be exported as {family.architecture}: {error}") from None
    lost = [f"{key}={asked[key]!r} (there it would be {back[key]!r})" for key in asked if asked[key] != back[key]]
    if lost:
        raise ConfigError(
            f"this model cannot be exported as {family.architecture}, whose config.json cannot say {', '.join(lost)}.\n"
            f"Another model.family may fit: {', '.join(families())}."
        )
