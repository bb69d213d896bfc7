"""Epoch and token budgets as a number of steps, which the learning-rate schedule and every display need beforehand.

    recipe = in_steps(recipe, mixture, exclude, world_size, folder)

The order of the whole run is planned without reading a token: about a microsecond per dialogue and epoch. A run that is
continued keeps the number it began with, in its config.yaml, so that its learning rates stay the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path

import yaml

from chatmill.config import ConfigError
from chatmill.data.mixture import Mixture
from chatmill.data.schedule import Schedule
from chatmill.trainer.config import Recipe, TrainSection


def in_steps(recipe: Recipe, mixture: Mixture, exclude: Mapping[int, Collection[str]], world_size: int, folder: Path) -> Recipe:
    """The recipe with train.steps as its budgets make it; as it is where it has none."""
    train = recipe.train
    if train.epochs is None and train.tokens is None:
        return recipe
    steps = _begun_with(folder, train)
    if steps is None:
        most = train.steps if "steps" in train.model_fields_set else None
        schedule = Schedule(
            mixture,
            sequence_length=recipe.data.sequence_length,
            global_batch=world_size * train.micro_batch * train.accumulation,
            seed=train.seed,
            overlong=recipe.data.overlong,
            overlap=recipe.data.overlap,
            epochs=train.epochs,
            max_tokens=train.tokens,
            max_dialogues=recipe.data.max_dialogues,
            exclude=exclude,
        )
        steps = sum(1 for _ in islice(schedule.steps(), most))
    if not steps:
        raise ConfigError(
            "train.epochs: nothing is left of the data sets to make a step of: see data.exclude and data.overlong."
        )
    return recipe.model_copy(update={"train": train.model_copy(update={"steps": steps})})


def _begun_with(folder: Path, train: TrainSection) -> int | None:
    """The steps that the run in `folder` counted for the same budgets, if it has begun."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    old = yaml.safe_load(file.read_text(encoding="utf-8")).get("train", {})
    return int(old["steps"]) if (old.get("epochs"), old.get("tokens")) == (train.epochs, train.tokens) else None
