"""A sweep file: which recipe, which fields, over which values, how many trials, where.

    name: tiny-lr
    recipe: tiny
    overrides: [train.steps=200, evaluation.every_steps=50]
    trials: 16
    sampler: tpe
    pruning: {kind: median}
    space:
      optimizer.lr: {low: 1e-4, high: 1e-2, log: true}
      model.layers: {low: 2, high: 8, step: 2}
      train.micro_batch: {choices: [2, 4, 8]}
    scaling: parameters

Any recipe field can be an axis: learning rate and batch, data.max_dialogues, model.hidden_size ... All trials and their
results are kept in DIR/NAME; the same command continues where it was stopped. Imports neither torch nor optuna.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from chatmill.config import ConfigError, Section, read_yaml, validate

from ...trainer.config import Recipe, load_recipe
from ..jobs.job import JobName, JobSpec, Text

Value = bool | int | float | str | None


def _number(value: Value) -> Value:
    """PyYAML reads 1e-4 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class Axis(Section):
    """Values of one field: `choices`, or numbers from low to high (`log`: evenly over magnitudes; `step`: on a lattice)."""

    choices: tuple[Annotated[Value, BeforeValidator(_number)], ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = Field(default=None, gt=0)
    points: int = Field(default=5, gt=1, description="values of a range in a grid")

    @model_validator(mode="after")
    def _check(self) -> Axis:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("give either choices, or low and high")
        if not self.choices:
            if self.low is None or self.high is None or not self.low < self.high:
                raise ValueError("low and high: expected low < high")
            if self.log and (self.low <= 0 or self.step is not None):
                raise ValueError("log: low must be positive, and step cannot be combined with it")
        return self

    @property
    def is_integer(self) -> bool:
        """Whether a range is over whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def grid(self) -> list[Value]:
        """The values of this axis in a grid, in order."""
        if self.choices:
            return list(self.choices)
        assert self.low is not None and self.high is not None
        if self.step is not None:
            count = int((self.high - self.low) / self.step + 1e-9) + 1
            values: list[float] = [self.low + i * self.step for i in range(count)]
        elif self.log:
            values = [self.low * (self.high / self.low) ** (i / (self.points - 1)) for i in range(self.points)]
        else:
            values = [self.low + (self.high - self.low) * i / (self.points - 1) for i in range(self.points)]
        return list(dict.fromkeys(round(v) for v in values)) if self.is_integer else list(values)


class Pruning(Section):
    """Stop trials whose validation is bad compared with others at the same step.

    median: worse than the median of earlier trials. halving: successive halving. Nothing is pruned before `warmup_steps`
    training steps, nor (median) before `startup_trials` trials are complete.
    """

    kind: Literal["none", "median", "halving"] = "median"
    startup_trials: int = Field(default=4, ge=0)
    warmup_steps: int = Field(default=0, ge=0)


class SweepConfig(Section):
    """One sweep. workers: trials at the same time (local processes, or elements of a Slurm array).

    metric: the validation figure at the end of a trial that is compared; accuracy is maximised, the others are minimised.
    scaling: fit metric = a + b * x^-c over the trials, x being `parameters`, `tokens` or the name of a numeric axis.
    job: resources of one worker; a trial runs on one node. keep_checkpoints: of the best trial only, or of all.
    """

    name: JobName
    dir: Text = "sweeps"
    recipe: Text
    overrides: tuple[Text, ...] = ()
    trials: int = Field(default=16, gt=0)
    workers: int = Field(default=1, gt=0, le=1000)
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    seed: int = Field(default=0, ge=0)
    metric: Literal["loss", "perplexity", "accuracy"] = "loss"
    pruning: Pruning = Pruning()
    space: dict[Text, Axis] = Field(min_length=1)
    scaling: Text | None = None
    keep_checkpoints: Literal["best", "all"] = "best"
    job: JobSpec = JobSpec()

    @property
    def folder(self) -> Path:
        """Where everything of the sweep is kept."""
        return (Path(self.dir) / self.name).absolute()

    @property
    def maximise(self) -> bool:
        """Whether larger is better."""
        return self.metric == "accuracy"

    def grid(self) -> list[dict[str, Value]]:
        """All points of the grid."""
        points = itertools.product(*(axis.grid() for axis in self.space.values()))
        return [dict(zip(self.space, point, strict=True)) for point in points]

    def trial_overrides(self, values: dict[str, Value], run_name: str) -> list[str]:
        """The words after the recipe's name for one trial."""
        several = ["parallel.strategy=ddp"] if self.job.world_size > 1 and not self._chose_strategy() else []
        words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        return [*self.overrides, *several, *words, f"run.dir={self.folder / 'runs'}", f"run.name={run_name}"]

    def _chose_strategy(self) -> bool:
        return any(word.startswith("parallel.strategy=") for word in self.overrides) or "parallel.strategy" in self.space

    def trial_recipe(self, values: dict[str, Value], run_name: str) -> Recipe:
        """The resolved recipe of one trial. Raises ConfigError."""
        return load_recipe(self.recipe, self.trial_overrides(values, run_name))


def load_sweep(path: Path) -> SweepConfig:
    """Read and check a sweep file, every axis at both ends. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such sweep file")
    sweep = validate(SweepConfig, read_yaml(path), str(path))
    ends = {key: axis.grid() for key, axis in sweep.space.items()}
    for pick in (0, -1):
        recipe = sweep.trial_recipe({key: values[pick] for key, values in ends.items()}, "check")
    if not recipe.evaluation.at_end:
        raise ConfigError(f"{path}: a trial is judged by its validation at the end: leave evaluation.at_end=true")
    if sweep.pruning.kind != "none" and recipe.evaluation.every_steps == 0:
        raise ConfigError(f"{path}: pruning needs validation in training: set evaluation.every_steps, or pruning.kind=none")
    if sweep.scaling not in (None, "parameters", "tokens") and sweep.scaling not in sweep.space:
        known = ", ".join(sweep.space)
        raise ConfigError(f"{path}: scaling={sweep.scaling!r}: expected parameters, tokens or one of {known}")
    if sweep.job.nodes > 1:
        raise ConfigError(f"{path}: job.nodes={sweep.job.nodes}: a trial runs on one node; raise workers for more at a time")
    return sweep
