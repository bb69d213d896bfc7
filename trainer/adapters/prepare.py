"""Freeze what a recipe freezes and put adapters on what it targets: a Decoder, changed in place before an engine wraps it.

    prepare(model, recipe)            # the model's weights are still undefined: sources.py gives them values
    trained, kept = trained_parameters(model), kept_parameters(model)

Matrices that stay frozen get model.base_precision (tables: bf16 instead of 4 or 8 bits); norms and biases stay fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from chatmill.config import ConfigError

from ..adapter_config import QUANTISED, AdapterSection, Precision
from ..config import Recipe
from ..model.decoder import Block, Decoder, TokenTable
from ..model.language_model import LanguageModel
from ..model.parts import Linear
from .layers import KEPT, AdaptedLinear, AdaptedTable, FrozenLinear, in_precision

ALL_LINEAR = "all-linear"
THEIRS = {"embed_tokens": "embed", "lm_head": "head"}  # Hugging Face's names; q_proj and the like lose their ending


def prepare(model: LanguageModel, recipe: Recipe) -> None:
    """Make the model what adapter, train.freeze and model.base_precision ask for. Raises ConfigError."""
    precision = recipe.model.base_precision
    if not isinstance(model, Decoder) and (recipe.adapter is not None or precision != "fp32"):
        raise ConfigError(
            f"adapter and model.base_precision work on our own decoder only; {recipe.model.checkpoint} is a model of "
            "transformers.\nTrain all weights, or choose some with train.freeze."
        )
    if recipe.adapter is not None:
        assert isinstance(model, Decoder)
        adapt(model, recipe.adapter, precision)
    elif recipe.train.freeze:
        names = matching(recipe.train.freeze, [name for name, _ in model.named_parameters()], "train.freeze")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in names)
        if len(names) == len(list(model.parameters())):
            raise ConfigError("train.freeze matches every parameter: nothing would be trained. Leave some out.")
        _lower(model, precision)


def adapt(model: Decoder, settings: AdapterSection, precision: Precision = "fp32") -> None:
    """Freeze the model, except what settings.train names, and put adapters on settings.targets. Raises ConfigError."""
    targets = targeted(model, settings)
    whole = matching(settings.train, [name for name, _ in model.named_parameters()], "adapter.train")
    if both := sorted(name for name in targets if f"{name}.weight" in whole):
        raise ConfigError(f"{both[0]} is in adapter.targets and in adapter.train: train it whole, or with an adapter.")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if f"{name}.weight" in whole:
            continue
        made: nn.Module | None = None
        if isinstance(module, Linear):
            if name in targets:
                made = AdaptedLinear(module, precision, settings, name)
            elif precision in QUANTISED:
                made = FrozenLinear(module, precision, name)
        elif isinstance(module, TokenTable) and name in targets:
            made = AdaptedTable(module, precision, settings, is_head=name == "head")
        if made is not None:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made)
    for name, parameter in model.named_parameters():
        if name in whole:
            parameter.requires_grad_(True)
    _lower(model, precision)
    for block in model.layers:
        cast(Block, block).draws = settings.dropout > 0


def _lower(model: LanguageModel, precision: Precision) -> None:
    """Give what is frozen, has two dimensions and is fp32 the precision of the base."""
    if precision == "fp32":
        return
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name == "weight" and parameter.ndim == 2 and parameter.dtype == torch.float32 and not parameter.requires_grad:
                setattr(module, name, in_precision(parameter, precision))


def targeted(model: Decoder, settings: AdapterSection) -> set[str]:
    """Names of the modules that get an adapter. Raises ConfigError for a target that is none, or cannot have one."""
    linear = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    tables = [name for name, module in model.named_modules() if isinstance(module, TokenTable)]
    found: set[str] = set()
    for given in settings.targets:
        target = THEIRS.get(given, given.removesuffix("_proj"))
        names = linear if given == ALL_LINEAR else [name for name in [*linear, *tables] if _matches(name, target)]
        if not names:
            raise ConfigError(
                f"adapter.targets: no module is called {given!r}.\nNames look like q, k, v, o, gate, up, down, mlp.*, "
                "layers.0.attention.q, embed, head (of untied embeddings), or all-linear."
            )
        found |= set(names)
    if chosen := sorted(found & set(tables)):
        _check_tables(model, settings, chosen)
    return found


def _check_tables(model: Decoder, settings: AdapterSection, chosen: Sequence[str]) -> None:
    """Refuse adapters on tables that could not be merged, or that this method does not define."""
    if model.head is None:
        raise ConfigError(
            "adapter.targets: embed is tied to the classifier, so an adapter on it could not be merged into one table.\n"
            "Leave it out, or train the table whole: adapter.train=[embed.weight]."
        )
    asked = {"method=dora": settings.method == "dora", "init=pissa": settings.init == "pissa", "dropout": settings.dropout > 0}
    if wrong := [name for name, given in asked.items() if given]:
        raise ConfigError(f"adapter.targets: {', '.join(chosen)} can have a plain LoRA only, not adapter.{wrong[0]}.")


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def matching(patterns: Iterable[str], names: Sequence[str], field: str) -> set[str]:
    """The names that a pattern matches. Raises ConfigError for a pattern that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ConfigError(
                f"{field}: no parameter name matches {pattern!r}.\n"
                "Names look like embed.weight, layers.0.attention.q.weight, layers.0.mlp_norm.weight, norm.weight, head.weight."
            )
        found |= matched
    return found


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the optimizer updates."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def frozen_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What it leaves alone."""
    return [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]


def has_adapters(model: nn.Module) -> bool:
    """Whether checkpoints hold an adapter instead of the whole model."""
    return any(isinstance(module, AdaptedLinear | AdaptedTable) for module in model.modules())


def kept_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What a checkpoint holds: all parameters, or with adapters the trained ones and where the adapter began."""
    named = list(model.named_parameters())
    if not has_adapters(model):
        return named
    return [(name, p) for name, p in named if p.requires_grad or name.rpartition(".")[2] in KEPT]


def held_bytes(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, int, int]]:
    """(dtype, elements, bytes) of parameters by dtype; codes of a quantised weight count as uint8."""
    sums: dict[str, list[int]] = {}
    for _, tensor in named:
        numbers = getattr(tensor, "ds_numel", tensor.numel())  # ZeRO-3 keeps a shard
        found = sums.setdefault(str(tensor.dtype).removeprefix("torch."), [0, 0])
        found[0] += numbers
        found[1] += numbers * tensor.element_size()
    for dtype, (elements, size) in sorted(sums.items()):
        yield dtype, elements, size
