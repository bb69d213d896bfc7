"""The folder of a run: config, environment, metrics, events. Text and JSON lines; only rank 0 writes.

runs/NAME/{config.yaml, command, environment.json, metrics.jsonl, events.jsonl, samples.jsonl, checkpoints/, logs/}
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from chatmill.config import ConfigError, dump_yaml, read_yaml, validate
from chatmill.files import replace_text
from chatmill.processes import own_process
from chatmill.run_files import MANIFEST, PREEMPTED, list_checkpoints, read_jsonl, step_of

from ..config import Recipe
from ..optim.schedule import same_rates
from .full_disk import WaitingFiles

# What may differ between the attempts of one run without changing what it computes. train.steps may too, where the steps done
# keep their learning rates.
FREE = ("run", "logging", "checkpoint", "evaluation", "parallel", "kernels", "guard")
FREE_TRAIN = (
    "micro_batch",
    "accumulation",
    "activation_checkpointing",
    "activation_checkpointing_layers",
    "compile",
    "compile_backend",
    "cpu_threads",
    "hang_timeout_s",
)
CLAIM_WAIT_S = 20.0  # time for a training that was told to stop to save
# Weights and exclusions of future steps may change, and data may have moved. The position in the checkpoint refuses other data,
# and a change of what past steps have used.
FREE_DATA = ("mix", "curriculum", "exclude", "damaged_blocks")


class RunFolder:
    """Appends to the run's files. Every line is flushed, so a killed run loses none. A full disk does not stop a run."""

    def __init__(self, path: Path, on_metric: Callable[[Mapping[str, Any]], None] = lambda line: None) -> None:
        self.path = path
        self._files = WaitingFiles(path)
        self._on_metric = on_metric
        self._lock: TextIO | None = None

    def create(self, recipe: Recipe, environment: Mapping[str, Any]) -> None:
        """Create the folder and write what is known before the first step."""
        for folder in (self.path, self.path / "checkpoints", self.path / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.path / "config.yaml", dump_yaml(recipe))
        replace_text(self.path / "command", shlex.join([sys.executable, *sys.orig_argv[1:]]) + "\n")
        replace_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        (self.path / PREEMPTED).unlink(missing_ok=True)

    def claim(self) -> bool:
        """Whether no other training writes here; if so, none can until release().

        A record lock, which also ends with its process. True where the file system has no locks.
        """
        if self._lock is None:
            try:
                (self.path / "logs").mkdir(parents=True, exist_ok=True)
                self._lock = (self.path / "logs" / "training.lock").open("a")
            except OSError:  # nothing can be written: the first file that the run needs will report it
                return True
        until = time.monotonic() + CLAIM_WAIT_S
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return True
                if time.monotonic() > until:
                    return False
                time.sleep(0.2)  # the other one may still be saving
            else:
                return True

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check_same(self, recipe: Recipe) -> None:
        """Refuse to continue a run with a recipe that would compute something else. Raises ConfigError naming the fields."""
        file = self.path / "config.yaml"
        if not file.is_file():
            return
        old, new = read_yaml(file), recipe.model_dump(mode="json")
        free_train: tuple[str, ...] = FREE_TRAIN
        with contextlib.suppress(ConfigError):  # fields newer than the run have their defaults
            begun = validate(Recipe, old, str(file))
            old = begun.model_dump(mode="json")
            done = max(map(step_of, list_checkpoints(self.path)), default=0)
            if done <= recipe.train.steps and same_rates(begun, recipe, done):
                free_train = (*FREE_TRAIN, "steps")
        both_mixed = bool(recipe.data.mix and old.get("data", {}).get("mix"))
        free_data = (*FREE_DATA, "path") if both_mixed or self._data_moved(old, recipe) else FREE_DATA
        free_model = ("checkpoint",) if self._base_moved(old, recipe) else ()
        differing = [
            f"  {section}.{key}: {(old.get(section) or {}).get(key)!r} -> {value!r}"
            for section, fields in new.items()
            if section not in FREE and isinstance(fields, dict)
            for key, value in fields.items()
            if not (section == "train" and key in free_train)
            and not (section == "data" and key in free_data)
            and not (section == "model" and key in free_model)
            and (old.get(section) or {}).get(key) != value
        ]
        differing += [f"  {name}: {old[name]!r} -> None" for name in old if old[name] and name in new and new[name] is None]
        if old.get("objective", recipe.objective) != recipe.objective:
            differing.insert(0, f"  objective: {old['objective']!r} -> {recipe.objective!r}")
        if differing:
            raise ConfigError(
                f"{self.path} holds a run with another recipe:\n" + "\n".join(differing) + "\n"
                f"Continue it as it was: chatmill train {self.path}/config.yaml\n"
                f"or begin another run, from its weights if you like: run.name=NEW model.checkpoint={self.path}"
            )

    def _data_moved(self, old: Mapping[str, Any], recipe: Recipe) -> bool:
        """Whether the data set may have moved: its old folder is gone, and a checkpoint will tell whether it is the same."""
        before, now = old.get("data", {}).get("path"), recipe.data.path
        moved = bool(before and now and "://" not in before) and not Path(before).exists()
        return moved and any((self.path / "checkpoints").glob("step-*"))

    def _base_moved(self, old: Mapping[str, Any], recipe: Recipe) -> bool:
        """Whether the checkpoint that the run started from was moved: gone from its old place, and the same here."""
        before, now = old.get("model", {}).get("checkpoint"), recipe.model.checkpoint
        own = list_checkpoints(self.path)
        if not (before and now and own) or Path(before).exists():
            return False
        lineage = _manifest(own[-1]).get("meta", {}).get("lineage") or [{}]
        checksum = lineage[0].get("checksum")
        return checksum is not None and checksum == _manifest(([Path(now), *list_checkpoints(now)])[-1]).get("checksum")

    def metric(self, **values: Any) -> None:
        """One line of metrics.jsonl, and a call of on_metric (the trackers)."""
        self._append("metrics.jsonl", values)
        self._on_metric(values)

    def event(self, kind: str, /, **values: Any) -> None:
        """One line of events.jsonl."""
        self._append("events.jsonl", {"time": round(time.time(), 3), "event": kind, **values})

    def sample(self, **values: Any) -> None:
        """One line of samples.jsonl."""
        self._append("samples.jsonl", values)

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """A small JSON file, replaced in one step."""
        self._files.replace(name, json.dumps(values, indent=1) + "\n")

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        self._files.append(name, json.dumps(values) + "\n")

    def has_finished(self, step: int) -> bool:
        """Whether the run has ended at this step, after its last validation and checkpoint."""
        return any(e.get("event") == "finished" and e.get("step") == step for e in read_jsonl(self.path / "events.jsonl"))

    def forget_after(self, step: int) -> None:
        """Drop metrics and samples later than `step`: the resumed run writes them again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            if file.is_file():
                kept = [line for line in read_jsonl(file) if line.get("step", 0) <= step]  # also removes a torn last line
                replace_text(file, "".join(json.dumps(line) + "\n" for line in kept))


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint, {} where it cannot be read: here it only tells what the checkpoint is."""
    try:
        found = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_environment() -> dict[str, Any]:
    """Versions, machine and process, for environment.json."""
    versions = {}
    packages = ("chatmill", "torch", "triton", "numpy", "accelerate", "deepspeed", "webdataset", "tokenizers")
    for name in (*packages, "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "process": own_process(),
        "cpus": os.cpu_count(),
        "versions": versions,
    }
