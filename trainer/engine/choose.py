"""The engine that a recipe names."""

from __future__ import annotations

from ..config import Recipe
from ..distributed.world import World
from ..model.language_model import LanguageModel
from .engine import Engine
from .torch_engine import TorchEngine


def build_engine(recipe: Recipe, model: LanguageModel, world: World) -> Engine:
    """The engine of parallel.strategy. Raises ConfigError where it is not installed."""
    if recipe.parallel.strategy.startswith("zero"):
        from .zero import ZeroEngine

        return ZeroEngine(recipe, model, world)
    return TorchEngine(recipe, model, world)
