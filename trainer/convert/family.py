"""What a family of Hugging Face models fixes, and where its description is found: by its name, one small file each.

    family_of("qwen3").architecture        "Qwen3ForCausalLM"
    known_architectures()                  of all families

families/GROUP/NAME.py holds FAMILY for the model_type NAME. The groups say where a layer's norms stand. docs/models.md
tells how to add a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

from ..model_config import ModelConfig, family_files

ROPE_KINDS = ("linear", "llama3", "yarn")  # beside `default`
QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768, "max_window_layers": 28}


SILU = {"silu": "silu", "swish": "silu"}


@dataclass(frozen=True)
class Family:
    """What an architecture fixes, and what transformers assumes for keys that config.json may omit.

    qkv_bias, output_bias: always or never there, or the key of config.json that says so.
    windows: on no layer; on all layers when `sliding_window` is set; as use_sliding_window and layer_types say (`layers`); or
        as layer_types alone say (`types`), with the kinds of `layer_types` where config.json names none.
    fixed: fields of ModelConfig with the same value in all its models. fields: field of ModelConfig -> key of config.json that
        holds it as it is. computes: whether a config.json is of the kind described here, where a model_type has others, too,
        which are left to transformers. read: further fields out of config.json; write: their keys.
    neutral: key -> the values with which it changes nothing; all others are refused.
    activation: the key that names it, and its names -> those of ModelConfig.
    rope: kinds of rotary scaling that transformers computes for it. rope_theta: the base where none is named. partial: the part
        of a head's channels that turn where config.json does not say; None where all turn. window_theta: for layers with a
        window, whose angles have a base of their own: its older key ("" for none) and its default.
    fused: their module -> our modules whose rows lie in it one after the other.
    names: our module -> theirs, where it differs from NAMES of names.py.
    extra: further keys of an exported config.json.
    gguf: the architecture's name in GGUF files; None where this project writes none.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    windows: Literal["none", "all", "layers", "types"] = "none"
    layer_types: Callable[[Mapping[str, Any], int], list[str]] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    computes: Callable[[Mapping[str, Any]], bool] | None = None
    read: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None
    write: Callable[[ModelConfig], dict[str, Any]] | None = None
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    activation: tuple[str, Mapping[str, str]] = ("hidden_act", SILU)
    rope: tuple[str, ...] = ROPE_KINDS
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    rope_theta: float = 10_000.0
    partial: float | None = None
    window_theta: tuple[str, float] | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    gguf: str | None = None


def every(interval: int) -> Callable[[Mapping[str, Any], int], list[str]]:
    """layer_types with full attention in every interval-th layer and a window in the others."""
    return lambda raw, layers: ["full_attention" if (i + 1) % interval == 0 else "sliding_attention" for i in range(layers)]


@cache
def family_of(name: str) -> Family:
    """The description of a family that ModelConfig.family may name."""
    group = family_files()[name].parent.name
    found: Family = import_module(f"{__package__}.families.{group}.{name}").FAMILY
    return found


def families() -> dict[str, Family]:
    """All families by name."""
    return {name: family_of(name) for name in family_files()}


def known_architectures() -> str:
    """The names of all architectures, for messages."""
    return ", ".join(family.architecture for family in families().values())
