"""`chatmill recipes`: the shipped recipes, what they train, and what they need on a card of each class.

    rows = recipe_rows()          # one per training recipe; needs torch for the memory of activations

The figures are those of `chatmill plan` (trainer/plan/plan.py): the fewest GPUs on which the recipe fits as it is written, and
the time that it takes on them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from chatmill.config import ConfigError
from chatmill.formatting import duration, number

from ...data.recipe import RECIPES as DATA_RECIPES
from ...trainer.config import RECIPES, ModelConfig, Recipe, load_recipe
from ...trainer.plan.hardware import GIB, Gpu, find_gpu
from .resolve import model_shape

CLASSES = ("4090", "h100", "h200")  # cards of 24, 80 and 141 GB
WIDTH = 31
COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Need:
    """The fewest GPUs of a class that hold the recipe, bytes on each of them, and hours of the run; gpus 0: it never fits."""

    card: str
    gpus: int
    bytes_each: int
    hours: float


@dataclass(frozen=True)
class Row:
    """One training recipe. parameters: None where the model is in a checkpoint that is not here; needs are then empty."""

    name: str
    about: str
    parameters: int | None
    needs: tuple[Need, ...]


def recipes_command(as_json: bool = False) -> int:
    """Print the table; the time is for bf16 at the share of the GPU's peak that `chatmill plan` assumes."""
    data = {file.stem: about(file) for file in sorted(DATA_RECIPES.glob("*.yaml"))}
    if as_json:
        print(json.dumps({"train": [asdict(row) for row in recipe_rows()], "data": data}, indent=1))
        return 0
    print(f"{'chatmill train':<16}{'parameters':>11}" + "".join(f"{card:>{WIDTH}}" for card in CLASSES), flush=True)
    unknown = False
    for row in recipe_rows():
        cells = "".join(f"{_cell(need):>{WIDTH}}" for need in row.needs)
        size = number(row.parameters) if row.parameters is not None else "?"
        unknown = unknown or row.parameters is None
        print(f"{row.name:<16}{size:>11}{cells}\n    {row.about}", flush=True)
    print("\nchatmill data build")
    for name, words in data.items():
        print(f"{name}\n    {words}")
    if unknown:
        print("\n?: the size is in a checkpoint that is not here yet; the recipe's own comment says how to make it")
    print("\nfewest GPUs x memory used, time of the whole run (bf16, assumed); chatmill plan RECIPE says more")
    return 0


def recipe_rows() -> Iterator[Row]:
    """A row for each shipped training recipe. Raises ConfigError without torch."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("torch is not installed here: it is needed to trace the memory of activations (no GPU is).")
    for file in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(file.stem)
        shape = _shape(recipe)
        needs = () if shape is None else tuple(_needs(recipe, shape))
        yield Row(file.stem, about(file), None if shape is None else shape.parameter_counts()["total"], needs)


def about(file: Path) -> str:
    """What the comment at the head of a recipe says first."""
    lines = (line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("yaml-language-server")), "")


def _shape(recipe: Recipe) -> ModelConfig | None:
    try:
        found = model_shape(recipe)
    except ConfigError:
        found = None
    written = not recipe.model.model_fields_set <= {"checkpoint", "base_precision"}
    return found or (recipe.model.shape() if written else None)


def _needs(recipe: Recipe, shape: ModelConfig) -> Iterator[Need]:
    from ...trainer.plan.plan import MFU, Estimator, count_work

    estimator = Estimator(recipe, shape)
    strategy = recipe.parallel.strategy
    for name in CLASSES:
        gpu: Gpu = find_gpu(name)
        need = Need(name, 0, 0, 0.0)
        for gpus in COUNTS:
            engine = "single" if gpus == 1 else "fsdp2" if strategy == "single" else strategy
            total = estimator.memory(engine, gpus).total
            if total <= gpu.memory_bytes:
                hours = count_work(recipe, shape, gpu, gpus, mfu=MFU, context=None).hours
                need = Need(name, gpus, total, hours)
                break
        yield need


def _cell(need: Need) -> str:
    if not need.gpus:
        return "does not fit"
    return f"{need.gpus} x {need.bytes_each / GIB:.1f} GiB, {duration(3600 * need.hours)}"
