"""Experiment trackers in addition to metrics.jsonl: TensorBoard if it is installed; W&B, trackio, MLflow ... by name.

    logging.trackers: null                         TensorBoard if it is installed, in RUN/tensorboard
    logging.trackers: [tensorboard, wandb]         any that accelerate knows; `[]` for none

They are accelerate's own tracker classes, and those a user registered with accelerate.tracking.register_tracker_class. Only
rank 0 uses them. Every line of metrics.jsonl goes to each, nested figures as `eval/loss`. A tracker that fails is dropped with
one message and never stops a run. A resumed run continues the same page: the ids of W&B, trackio and MLflow are kept in
RUN/trackers.json, their project is `chatmill`; TensorBoard drops what is later than the resumed step.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import replace_text

from ..config import Recipe
from .full_disk import warn

NAMES = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
PROJECT, IDS = "chatmill", "trackers.json"
SETTINGS = ("run", "data", "model", "optimizer", "schedule", "train", "parallel")


class Trackers:
    """Opened at the first line, so a run that has nothing to do leaves nothing behind."""

    def __init__(self, recipe: Recipe, run_dir: Path, is_main: bool) -> None:
        self.recipe, self.run_dir = recipe, run_dir
        names = recipe.logging.trackers
        if names is None:
            names = ("tensorboard",) if importlib.util.find_spec("tensorboard") is not None else ()
        self._names: Sequence[str] = names if is_main else ()
        self._classes = {name: tracker_class(name) for name in self._names}
        self._open: dict[str, Any] = {}
        self._started = False

    def log(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if not self._names:
            return
        if not self._started:
            self._started = True
            for name in self._names:
                self._guarded(name, lambda name=name: self._start(name, int(line.get("step", 0))))
        values = flat({key: value for key, value in line.items() if key not in ("step", "time")})
        for name in list(self._open):
            self._guarded(name, lambda name=name: self._open[name].log(values, step=line.get("step")))

    def close(self) -> None:
        """Flush and close."""
        for name in list(self._open):
            self._guarded(name, lambda name=name: self._open[name].finish())
        self._open = {}

    def _start(self, name: str, step: int) -> None:
        base = self._classes[name]
        # we choose rank 0 ourselves: accelerate would set up its own process group to find out
        made: Any = type(base.__name__, (base,), {"main_process_only": False})
        known = self._ids().get(name)
        run = self.recipe.run.name
        if name == "tensorboard":
            tracker = made("tensorboard", logging_dir=str(self.run_dir), purge_step=step)
        elif name == "wandb":
            tracker = made(PROJECT, name=run, id=self._run_id(name), resume="allow", dir=str(self.run_dir))
        elif name == "trackio":  # knows runs by their names
            tracker = made(PROJECT, name=f"{run}-{self._run_id(name)}", resume="allow")
        elif name == "mlflow":
            tracker = made(PROJECT, run_name=run, run_id=known)
        elif base.requires_logging_directory:
            tracker = made(self.recipe.run.name, str(self.run_dir))
        else:
            tracker = made(self.recipe.run.name)
        tracker.start()
        self._open[name] = tracker
        if name == "mlflow" and known is None:
            self._keep_id(name, tracker.tracker.info.run_id)
        # TensorBoard would open a second run for the settings; MLflow refuses settings that a resume changed
        if name != "tensorboard" and not (name == "mlflow" and known is not None):
            dump = self.recipe.model_dump(mode="json")
            tracker.store_init_configuration(flat({section: dump[section] for section in SETTINGS}))

    def _ids(self) -> dict[str, str]:
        file = self.run_dir / IDS
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def _keep_id(self, name: str, value: str) -> str:
        replace_text(self.run_dir / IDS, json.dumps(self._ids() | {name: value}) + "\n")
        return value

    def _run_id(self, name: str) -> str:
        return self._ids().get(name) or self._keep_id(name, secrets.token_hex(6))

    def _guarded(self, name: str, action: Any) -> None:
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            warn(f"tracker {name} dropped: {type(error).__name__}: {error}")


def tracker_class(name: str) -> Any:
    """accelerate's class of that name. Raises ConfigError if it is unknown or its package is missing."""
    import accelerate.tracking as tracking

    # its logger refuses to work before accelerate has set up a process group
    tracking.logger = logging.getLogger("accelerate.tracking")
    known = {str(getattr(key, "value", key)): value for key, value in tracking.LOGGER_TYPE_TO_CLASS.items()}
    if name not in known:
        raise ConfigError(f"logging.trackers: {name!r} is unknown; choose from {', '.join(sorted(known))}")
    installed = {str(getattr(found, "value", found)) for found in tracking.get_available_trackers()}
    if name in NAMES and name not in installed:
        raise ConfigError(f"logging.trackers: {name} is not installed (pip install {name}), or leave it out")
    return known[name]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under slash-joined names; only numbers, strings and booleans."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float | str):
            found[f"{prefix}{key}"] = value
    return found
