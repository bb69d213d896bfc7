"""`chatmill recipes`: the shipped recipes, what they train, and what they need on a card of each class.

    rows = recipe_rows()          # one per training recipe
    python -m chatmill.launcher.jobs.recipe_table      # writes recipe_needs.json anew, after a recipe or the plan has changed

The figures are those of `chatmill plan` (trainer/plan/plan.py): the fewest GPUs on which the recipe fits as it is written, and
the time that it takes on them. Tracing the memory of all recipes takes 14 s and torch. So what they need is shipped in
recipe_needs.json, by a hash of the recipe and the model's shape; what is not in it is traced.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import replace_text
from chatmill.formatting import duration, number

from ...data.recipe import RECIPES as DATA_RECIPES
from ...trainer.config import RECIPES, ModelConfig, Recipe, load_recipe
from ...trainer.plan.hardware import GIB, Gpu, find_gpu
from .resolve import model_shape

CLASSES = ("4090", "h100", "h200")  # cards of 24, 80 and 141 GB
WIDTH = 31
COUNTS = (1, 2, 4, 8, 16, 32, 64)
# Of SmolLM2-135M(-Instruct), which several recipes start from, before it is imported.
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "context": 8192,
    "rope_theta": 100000.0,
    "tied_embeddings": True,
}
NO_MATTER = {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"}
TABLE = Path(__file__).with_name("recipe_needs.json")


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
    """A row for each shipped training recipe. Raises ConfigError without torch where one is not in the table."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for file in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(file.stem)
        shape = _shape(recipe)
        needs = () if shape is None else known_needs(table, recipe, shape) or tuple(traced_needs(recipe, shape))
        yield Row(file.stem, about(file), None if shape is None else shape.parameter_counts()["total"], needs)


def about(file: Path) -> str:
    """What the comment at the head of a recipe says first."""
    lines = (line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("yaml-language-server")), "")


def _shape(recipe: Recipe) -> ModelConfig | None:
    """Of the checkpoint, if it is here; else the one that is usual for the recipe."""
    try:
        found = model_shape(recipe)
    except ConfigError:
        found = None
    return found or usual_shape(recipe)


def usual_shape(recipe: Recipe) -> ModelConfig | None:
    """The shape that the recipe writes, or that of the checkpoint which its comment says how to make; None where unknown."""
    if not recipe.model.model_fields_set <= {"checkpoint", "base_precision"}:
        return recipe.model.shape()
    return ModelConfig(**SMOLLM2) if str(recipe.model.checkpoint).startswith("runs/smollm2") else None


def key_of(recipe: Recipe, shape: ModelConfig) -> str:
    """Of everything that the needs follow from, but for the code and its defaults."""
    shape_facts = shape.model_dump(mode="json", exclude=NO_MATTER)
    facts = json.dumps([recipe.model_dump(mode="json", exclude_defaults=True), shape_facts], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def known_needs(table: Mapping[str, Any], recipe: Recipe, shape: ModelConfig) -> tuple[Need, ...]:
    """What the table says; nothing where it does not know this recipe."""
    return tuple(Need(**need) for need in table.get(key_of(recipe, shape), {}).get("needs", ()))


def traced_needs(recipe: Recipe, shape: ModelConfig) -> Iterator[Need]:
    """Traced on the meta device. Raises ConfigError without torch."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("torch is not installed here: it is needed to trace the memory of activations (no GPU is).")
    from ...trainer.plan.memory import Estimator
    from ...trainer.plan.plan import MFU, count_work

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


def write_table() -> int:
    """Trace every shipped recipe and write the table."""
    table = {}
    for file in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(file.stem)
        if shape := usual_shape(recipe):
            needs = [asdict(need) for need in traced_needs(recipe, shape)]
            table[key_of(recipe, shape)] = {"recipe": file.stem, "needs": needs}
    replace_text(TABLE, json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(write_table())
