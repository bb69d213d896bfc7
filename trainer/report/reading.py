"""What a report reads from a run folder. A missing, damaged or half-written file raises nothing.

    run = read_run(Path("runs/demo"))

Each problem becomes a line in `run.notes`, which the report shows: the report of a crashed run must say what it lacks.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chatmill.config import ConfigError
from chatmill.run_files import MANIFEST, is_published, read_jsonl


@dataclass(slots=True)
class RunRecord:
    """What a run left behind. train and evals are keyed by step, in order; a step that was redone counts once."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    evals: dict[int, dict[str, Any]] = field(default_factory=dict)
    averages: dict[int, dict[str, Any]] = field(default_factory=dict)  # evals of the averaged weights
    times: list[float] = field(default_factory=list)  # of every record, seconds since the epoch
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    data_path: Path | None = None
    data_manifest: dict[str, Any] = field(default_factory=dict)
    data_report: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def attempts(self) -> list[tuple[float, float]]:
        """When each attempt began and when its last record was written, by the run's events; pauses lie between them."""
        begins = sorted(real(e.get("time")) for e in self.events if e.get("event") in ("start", "resume"))
        times = sorted(self.times)
        if times and not (begins and begins[0] <= times[0]):
            begins.insert(0, times[0])
        spans = []
        for began, following in itertools.zip_longest(begins, begins[1:], fillvalue=math.inf):
            spans.append((began, max((t for t in times if began <= t < following), default=began)))
        return spans


def read_run(path: Path) -> RunRecord:
    """Read a run folder. Only a folder that is not there at all is an error (FileNotFoundError)."""
    if not path.is_dir():
        raise FileNotFoundError(f"no run folder at {path}: expected a folder with metrics.jsonl, made by `chatmill train`.")
    if is_published(path) and "splits" in _mapping(RunRecord(path, path.name), path / MANIFEST):
        raise ConfigError(f"{path} is a data set, whose own page is {path / 'report.html'}. Give a run folder.")
    run = RunRecord(path, path.resolve().name)
    run.config = _mapping(run, path / "config.yaml")
    run.environment = _mapping(run, path / "environment.json")
    run.command = _text(path / "command").strip()
    rows = _rows(run, path / "metrics.jsonl")
    _take_metrics(run, rows)
    run.events = _rows(run, path / "events.jsonl", optional=True)
    run.times = [t for t in (real(row.get("time")) for row in (*rows, *run.events)) if t > 1e8]
    run.samples = _rows(run, path / "samples.jsonl", optional=True)
    for file in sorted(path.glob("evaluation*.json")):
        if found := _mapping(run, file):
            run.evaluations[file.stem] = found
    name = run.config.get("run")
    if isinstance(name, dict) and name.get("name"):
        run.name = str(name["name"])
    _find_data(run)
    return run


def _rows(run: RunRecord, path: Path, optional: bool = False) -> list[dict[str, Any]]:
    if not path.is_file() and not optional:
        run.notes.append(f"{path.name} is missing.")
    damaged: list[str] = []
    rows = list(read_jsonl(path, damaged))
    if damaged:
        run.notes.append(f"{path.name}: {len(damaged)} damaged line{'s' if len(damaged) > 1 else ''} left out.")
    return rows


def real(value: Any) -> float:
    """value as a float; NaN for anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with printable values."""
    out: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{name}.")
        elif value is None or isinstance(value, bool):
            out[name] = {None: "–", True: "yes", False: "no"}[value]
        elif isinstance(value, list | tuple | dict):
            out[name] = ", ".join(str(v) for v in value) if len(value) else "–"
        else:
            out[name] = str(value)
    return out


def _take_metrics(run: RunRecord, rows: list[dict[str, Any]]) -> None:
    redone = 0
    for row in rows:
        step = real(row.get("step"))
        if not math.isfinite(step):
            continue
        at = int(step)
        if isinstance(row.get("eval"), dict):
            run.evals[at] = row["eval"]
            continue
        if isinstance(row.get("eval_ema"), dict):
            run.averages[at] = row["eval_ema"]
            continue
        if run.train and at <= next(reversed(run.train)):  # resumed from an earlier checkpoint: the old tail is void
            stale = [s for s in run.train if s >= at]
            redone += len(stale)
            for s in stale:
                del run.train[s]
            for measured in (run.evals, run.averages):
                for s in [s for s in measured if s >= at]:
                    del measured[s]
        run.train[at] = row
    run.evals = dict(sorted(run.evals.items()))
    if redone:
        run.notes.append(f"{redone} step{'s were' if redone > 1 else ' was'} redone after a resume; the last pass is shown.")
    bad = sum("loss" in row and not math.isfinite(real(row["loss"])) for row in run.train.values())
    if bad:
        run.notes.append(f"{bad} step{'s' if bad > 1 else ''} logged a loss that is not finite; the curves leave gaps there.")


def _find_data(run: RunRecord) -> None:
    data = run.config.get("data")
    written = data.get("path") if isinstance(data, dict) else None
    if not isinstance(written, str) or not written:
        return
    # A relative path is relative to where the run was started: usually the parent of runs/.
    bases = [Path.cwd(), *run.path.resolve().parents]
    folder = next((base / written for base in bases if (base / written).is_dir()), None)
    if folder is None:
        run.notes.append(f"The data set {written} is not on this machine: no data section.")
        return
    run.data_path = Path(written)
    run.data_manifest = _mapping(run, folder / "manifest.json")
    run.data_report = _mapping(run, folder / "report.json")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mapping(run: RunRecord, path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping, or an empty one and a note."""
    text = _text(path)
    if not text:
        run.notes.append(f"{path.name} is missing.")
        return {}
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, RecursionError):
        value = None
    if not isinstance(value, dict):
        run.notes.append(f"{path.name} is damaged.")
        return {}
    return {str(k): v for k, v in value.items()}
