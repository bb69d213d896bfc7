"""What of a model is trained, what is frozen, and in how many bytes: counted on the meta device, with the recipe's adapter.

parts = parts_of(recipe, config)
parts.trained, parts.frozen_bytes            # elements with gradients and moments; bytes of the rest, as it lies in memory
parts.flops_per_token(config, context)       # frozen matrices get no weight gradients: 4 FLOPs per element instead of 6
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ..adapters.layers import AdaptedTable
from ..adapters.prepare import prepare
from ..backends.choose import build_model
from ..config import Recipe
from ..foreign_config import ForeignConfig
from ..model.language_model import LanguageModel
from ..model.parts import Linear
from ..model_config import ModelConfig
from ..optim.optimizer import is_hidden_matrix, tables_of


@dataclass(frozen=True)
class Unit:
    """What an engine gathers at once: trained elements, and frozen ones by whether they are cast for compute."""

    trained: int = 0
    frozen_dense: int = 0  # elements
    frozen_codes: int = 0  # bytes of quantised weights, which stay as they are

    def gathered_bytes(self, compute_bytes: int) -> int:
        """Bytes of the whole unit in the compute dtype."""
        return compute_bytes * (self.trained + self.frozen_dense) + self.frozen_codes


@dataclass(frozen=True)
class ModelParts:
    """trained_matrices: those that Muon takes. layer, top: one layer, and all outside the layers. embedding: trained of it.

    frozen_matrices: elements of frozen matrices that take part in products; adapter: elements of the adapter's own.
    """

    trained: int
    trained_matrices: int
    frozen_bytes: int
    frozen_dense: int
    layer: Unit
    top: Unit
    embedding: int
    frozen_matrices: int = 0
    adapter: int = 0
    frozen_head: bool = False

    def flops_per_token(self, config: ModelConfig, context: float) -> float:
        """ModelConfig.flops_per_token less the weight gradients that are not made, and with the adapter's products."""
        return config.flops_per_token(context) - 2.0 * self.frozen_matrices + 6.0 * self.adapter


def parts_of(recipe: Recipe, config: ModelConfig) -> ModelParts:
    """The parts of the model that this recipe trains. Raises ConfigError where its adapter does not fit the model."""
    counts = config.parameter_counts()
    if recipe.adapter is None and not recipe.train.freeze:
        layer = (counts["total"] - counts["embedding"] - counts["head"] - config.hidden_size) // config.layers
        outside = counts["total"] - config.layers * layer
        embedding = counts["embedding"]
        matrices = counts["attention"] + counts["mlp"]
        return ModelParts(counts["total"], matrices, 0, 0, Unit(layer), Unit(outside), embedding)
    with torch.device("meta"):
        model = build_model(config)
        prepare(model, recipe)
    named = list(model.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    frozen = [p for _, p in named if not p.requires_grad]
    units = [_unit(layer) for layer in model.layers]
    total = _unit(model)
    in_layers = [sum(getattr(unit, field) for unit in units) for field in ("trained", "frozen_dense", "frozen_codes")]
    top = Unit(total.trained - in_layers[0], total.frozen_dense - in_layers[1], total.frozen_codes - in_layers[2])
    largest = max(units, key=lambda unit: unit.gathered_bytes(4))
    table, head = (model.get_submodule(config.tables[k].removesuffix(".weight")) for k in (0, -1))
    head_weight, embedded = cast(nn.Parameter, head.weight), cast(nn.Parameter, table.weight)
    frozen_head = not head_weight.requires_grad and not isinstance(head, AdaptedTable)
    products = _frozen_products(model) + frozen_head * head_weight.numel()
    return ModelParts(
        trained=sum(p.numel() for _, p in trained),
        trained_matrices=sum(p.numel() for name, p in trained if is_hidden_matrix(name, p, tables_of(config))),
        frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
        frozen_dense=total.frozen_dense,
        layer=largest,
        top=top,
        embedding=embedded.numel() if embedded.requires_grad else 0,
        frozen_matrices=products,
        frozen_head=frozen_head,
        adapter=sum(p.numel() for name, p in trained if name.endswith((".lora_a", ".lora_b"))),
    )


def _frozen_products(model: LanguageModel) -> int:
    """Elements of the layers' frozen matrices that a token is multiplied with."""
    config = model.config
    if not isinstance(config, ForeignConfig):
        linear = [module for module in model.modules() if isinstance(module, Linear) and not module.weight.requires_grad]
        return sum(module.in_features * module.out_features for module in linear)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad and name not in config.tables}
    dense = sum(p.numel() for p in frozen.values() if p.ndim == 2)
    routed = sum(p.numel() for p in frozen.values() if p.ndim == 3)
    return dense + routed * config.experts_per_token // max(1, config.experts)


def _unit(module: nn.Module) -> Unit:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    dense = sum(p.numel() for p in module.parameters() if not p.requires_grad and p.dtype.is_floating_point)
    codes = sum(p.numel() for p in module.parameters() if not p.requires_grad and not p.dtype.is_floating_point)
    return Unit(trained, dense, codes)
