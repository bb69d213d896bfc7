"""A causal language model of transformers, built from its config.json; what cannot be trained right is refused.

    model = build_foreign(raw, where)                   # undefined weights
    model.body, model.head, model.layers                # the decoder, the classifier, what engines shard

Only transformers' own classes are built: code that comes with a model is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from chatmill.config import ConfigError

INSTALL = "pip install 'chatmill[transformers]'"
# settings of a process, not of a model: they name kernels or code to load
NOT_OF_THE_MODEL = ("_implementation", "auto_map", "use_kernels")


@dataclass(frozen=True)
class Foreign:
    """causal: transformers' model. prefix, head_name: its attributes that hold decoder and classifier."""

    causal: Any
    prefix: str
    head_name: str

    @property
    def body(self) -> nn.Module:
        """The decoder, final norm included."""
        return cast(nn.Module, getattr(self.causal, self.prefix))

    @property
    def head(self) -> nn.Linear:
        """The classifier."""
        return cast(nn.Linear, self.causal.get_submodule(self.head_name))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the decoder."""
        depth = self.causal.config.num_hidden_layers
        found = [m for m in self.body.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if len(found) != 1:
            raise ConfigError(f"{type(self.causal).__name__}: no list of {depth} layers in it; it cannot be trained in layers.")
        return found[0]


def import_transformers() -> Any:
    """The library. Raises ConfigError where it is not installed, or is older than 5."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"this model needs transformers, which cannot be imported ({error}).\n{INSTALL}") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ConfigError(f"this model needs transformers 5 or newer, found {transformers.__version__}.\n{INSTALL}")
    return transformers


def transformers_config(raw: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration of a config.json. Raises ConfigError for what it does not know or we cannot train."""
    import_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    name = raw.get("model_type")
    if not isinstance(name, str) or name not in CAUSAL:
        found = "it names no model_type" if name is None else f"model_type {name!r} is no causal language model of transformers"
        code = "\nIt brings code of its own (auto_map), which is never run." if raw.get("auto_map") else ""
        raise ConfigError(f"{where}: {found}.{code}")
    architectures = raw.get("architectures")
    if architectures and CAUSAL[name] not in (architectures if isinstance(architectures, list) else [architectures]):
        raise ConfigError(f"{where}: architectures is {architectures}; expected {CAUSAL[name]}.")
    if parts := sorted(key for key in raw if key.endswith("_config") and key not in ("quantization_config", "text_config")):
        raise ConfigError(f"{where}: it has {', '.join(parts)}: a model for more than text, which is not supported.")
    if raw.get("is_encoder_decoder"):
        raise ConfigError(f"{where}: is_encoder_decoder is true; only decoders are supported.")
    if raw.get("quantization_config"):
        raise ConfigError(f"{where}: the weights are quantised. Import the unquantised model (bf16, fp16 or fp32).")
    kept = {key: value for key, value in raw.items() if not any(part in key for part in NOT_OF_THE_MODEL)}
    try:
        config = CONFIG_MAPPING[name].from_dict(kept)
    except Exception as error:  # validators of many kinds
        raise ConfigError(f"{where}: transformers refuses it: {error}") from None
    if getattr(config, "num_hidden_layers", None) is None or getattr(config, "vocab_size", None) is None:
        raise ConfigError(f"{where}: num_hidden_layers or vocab_size is missing; this kind of model is not supported.")
    return config


def build_foreign(raw: Mapping[str, Any], where: str) -> Foreign:
    """The model with undefined weights, on the default device and in the default dtype. Raises ConfigError."""
    config = transformers_config(raw, where)
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config.use_cache = False
    try:
        with no_init_weights():
            causal = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.get_default_dtype(), trust_remote_code=False
            )
        causal.tie_weights()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{where}: transformers cannot build it: {error}") from error
    return taken_apart(causal, where)


def taken_apart(causal: Any, where: str) -> Foreign:
    """Decoder and classifier of a model of transformers. Raises ConfigError where it is made of anything else."""
    prefix: str = causal.base_model_prefix
    head: Any = causal.get_output_embeddings()
    name = next((name for name, module in causal.named_modules() if module is head), None)
    if not hasattr(causal, prefix) or not isinstance(head, nn.Linear) or name is None or "." in name:
        raise ConfigError(f"{where}: {type(causal).__name__} is not a decoder with a linear classifier; it is not supported.")
    if getattr(head, "bias", None) is not None:
        raise ConfigError(f"{where}: {name} has a bias, which the fused loss does not add; it is not supported.")
    found = Foreign(causal, prefix, name)
    outside = {id(p) for p in causal.parameters()} - {id(p) for m in (found.body, head) for p in m.parameters()}
    if outside:
        names = [name for name, p in causal.named_parameters() if id(p) in outside]
        raise ConfigError(f"{where}: weights outside of decoder and classifier are not supported: {', '.join(names[:3])}.")
    for module in causal.modules():
        fix_rotation(module)
    return found


def fix_rotation(module: nn.Module) -> None:
    """Keep the rotary angles of short texts where they would depend on the longest text of a pack (dynamic, longrope).

    context_of keeps all texts that short.
    """
    kind = getattr(module, "rope_type", None)
    if kind in ("dynamic", "longrope"):
        module.rope_type = "default"  # type: ignore[assignment]  # only the update looks at it; the angles are computed
    elif isinstance(kind, dict):
        for layers in kind:
            kind[layers] = "default" if kind[layers] in ("dynamic", "longrope") else kind[layers]


def context_of(config: Any) -> int:
    """Longest text in tokens; where rotary angles change beyond the original context, that one."""
    context = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            context = min(context, int(part.get("original_max_position_embeddings") or context))
    return context
