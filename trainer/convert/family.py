"""What a family of Hugging Face models fixes, and where its description is found: by its name, one small file each.

    family_of("qwen3").architecture        "Qwen3ForCausalLM"
    known_architectures()                  of all families

families/GROUP/NAME.py holds FAMILY for the model_type NAME. The groups say where a layer's norms stand. docs/models.md
tells how to add a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

from ..model_config import family_files

ROPE_KINDS = ("linear", "llama3", "yarn")  # beside `default`
QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768, "max_window_layers": 28}


@dataclass(frozen=True)
class Family:
    """What an architecture fixes, and what transformers assumes for keys that config.json may omit.

    qkv_bias, output_bias: always or never there, or the key of config.json that says so.
    windows: on no layer, on all layers when `sliding_window` is set, or as use_sliding_window and layer_types say.
    fused: their module -> our modules whose rows lie in it one after the other.
    names: our module -> theirs, where it differs from NAMES of names.py.
    rope: kinds of rotary scaling that transformers computes for it. extra: further keys of an exported config.json.
    gguf: the architecture's name in GGUF files; None where this project writes none.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    qk_norm: bool = False
    windows: Literal["none", "all", "layers"] = "none"
    rope: tuple[str, ...] = ROPE_KINDS
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    gguf: str | None = None


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
