"""Epoch and token budgets as a number of steps, which the learning-rate schedule and every display need in advance.

    recipe = in_steps(recipe, mixture, exclude, batches, folder)

The order of the whole run is planned without reading a token, in about a microsecond per dialogue and epoch. A continued run
keeps the number it began with, from its config.yaml, so that its learning rates stay the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path

from chatmill.config import ConfigError, Section, read_yaml

from ...data.packing.mixture import Mixture
from ...data.packing.options import StreamOptions
from ...data.packing.schedule import Schedule
from ..config import Recipe


def stream_options(recipe: Recipe, exclude: Mapping[int, Collection[str]], batches: int) -> StreamOptions:
    """The recipe's order of packs, and their division. batches: how many are trained at the same time (World.batches)."""
    return StreamOptions(
        sequence_length=recipe.data.sequence_length,
        micro_batch=recipe.train.micro_batch,
        accumulation=recipe.train.accumulation,
        world_size=batches,
        seed=recipe.train.seed,
        overlong=recipe.data.overlong,
        overlap=recipe.data.overlap,
        epochs=recipe.train.epochs,
        max_tokens=recipe.train.tokens,
        max_dialogues=recipe.data.max_dialogues,
        exclude=exclude,
    )


def in_steps(recipe: Recipe, mixture: Mixture, exclude: Mapping[int, Collection[str]], batches: int, folder: Path) -> Recipe:
    """The recipe with train.steps set from its budgets; unchanged where it has none.

    With epochs and a rate that falls by tokens, schedule.total_tokens is set too, unless the recipe gives it.
    """
    train, schedule = recipe.train, recipe.schedule
    if train.epochs is None and train.tokens is None:
        return recipe
    found = _begun_with(folder, recipe)
    if found is None:
        most = train.steps if "steps" in train.model_fields_set else None
        order = Schedule(mixture, stream_options(recipe, exclude, batches))
        counts = [planned.tokens for planned in islice(order.steps(), most)]
        found = len(counts), sum(counts)
    steps, tokens = found
    if not steps:
        raise ConfigError("train.epochs: the data sets leave nothing to train on: see data.exclude and data.overlong.")
    changed: dict[str, Section] = {"train": train.model_copy(update={"steps": steps})}
    if train.epochs is not None and schedule.unit == "tokens" and schedule.total_tokens is None:
        if schedule.warmup_tokens >= tokens:
            raise ConfigError(
                f"schedule.warmup_tokens={schedule.warmup_tokens} leaves nothing of the run's {tokens:,} tokens.\n"
                "Warm up over fewer tokens, or train on more."
            )
        changed["schedule"] = schedule.model_copy(update={"total_tokens": tokens})
    return recipe.model_copy(update=changed)


def remarks(asked: Recipe, counted: Recipe) -> Iterator[str]:
    """What the budgets make of the other settings, for people. counted: the recipe of `in_steps`."""
    steps, train = counted.train.steps, asked.train
    if "steps" in train.model_fields_set and steps < train.steps:
        budget = f"train.epochs={train.epochs}" if train.epochs is not None else f"train.tokens={train.tokens:,}"
        yield f"note: {budget} ends the run after {steps:,} steps, before train.steps={train.steps:,}"
    warmup = counted.schedule.warmup_steps
    if counted.schedule.unit == "steps" and warmup >= steps:
        share = f"{steps / warmup:.0%} of optimizer.lr={counted.optimizer.lr:g}"
        yield f"note: schedule.warmup_steps={warmup} is not over before the end, step {steps:,}: the rate reaches {share}"


def _begun_with(folder: Path, recipe: Recipe) -> tuple[int, int] | None:
    """(steps, schedule.total_tokens) that the run in `folder` began with, where it has the same budgets."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    config = read_yaml(file)
    old, schedule = config.get("train", {}), config.get("schedule", {})
    before = old.get("epochs"), old.get("tokens"), schedule.get("unit", "steps")
    if before != (recipe.train.epochs, recipe.train.tokens, recipe.schedule.unit):
        return None
    return int(old["steps"]), int(schedule.get("total_tokens") or 0)
