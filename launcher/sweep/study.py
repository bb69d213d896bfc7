"""The sweep's memory: an Optuna study in a journal file, safe for workers on several nodes.

A journal (one appended line per event) rather than SQLite, which breaks on network file systems. Trials are assigned to one
worker at a time under a lock, so the number of trials is exact and no two workers draw the same random values.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import replace_text
from chatmill.processes import is_running, own_process

from .config import Axis, SweepConfig

JOURNAL = "journal.log"
HEARTBEAT = "heartbeat"
STALE_S = 120.0


def load_optuna() -> Any:
    """The optuna module, quiet. Raises ConfigError if it is not installed."""
    try:
        optuna: Any = importlib.import_module("optuna")
    except ImportError:
        raise ConfigError("chatmill sweep needs optuna: pip install 'chatmill[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(sweep: SweepConfig) -> Any:
    """Create or load the study; the points of a grid are queued once."""
    optuna = load_optuna()
    from .journal import Journal  # needs optuna

    sweep.folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(Journal(sweep.folder / JOURNAL))
    with lock(sweep.folder):
        study = optuna.create_study(
            study_name=sweep.name,
            storage=storage,
            load_if_exists=True,
            direction="maximize" if sweep.maximise else "minimize",
            sampler=_sampler(optuna, sweep, 0),
            pruner=_pruner(optuna, sweep),
        )
        if sweep.sampler == "grid" and not study.trials:
            for point in sweep.grid()[: sweep.trials]:
                study.enqueue_trial(point)
    return study


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One worker at a time."""
    with (folder / "lock").open("a") as handle:
        fcntl.lockf(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(handle, fcntl.LOCK_UN)


def ask(study: Any, sweep: SweepConfig) -> Any | None:
    """The next trial with its values, or None if all have been assigned.

    Trials whose worker died are queued again first. They keep their run folder, so the trainer continues them.
    """
    with lock(sweep.folder):
        _put_back_orphans(study, sweep)
        trials = study.get_trials(deepcopy=False)
        given = [t for t in trials if "put_back" not in t.user_attrs]
        waiting = any(t.state.name == "WAITING" for t in trials)
        if not waiting and (len(given) >= sweep.trials or sweep.sampler == "grid"):
            return None
        study.sampler = _sampler(load_optuna(), sweep, len(trials))
        trial = study.ask({key: distribution(axis) for key, axis in sweep.space.items()})
        if "run" not in trial.user_attrs:
            trial.set_user_attr("run", f"trial-{trial.number:04d}")
        beat(sweep.folder / "runs" / trial.user_attrs["run"])
        return trial


def put_back(study: Any, number: int, sweep: SweepConfig) -> None:
    """Give an unfinished trial up for another worker, with its values and its run folder."""
    frozen = study.get_trials(deepcopy=False)[number]
    study._storage.set_trial_user_attr(frozen._trial_id, "put_back", True)
    study.tell(number, state=load_optuna().trial.TrialState.FAIL)
    study.enqueue_trial(frozen.params, user_attrs={"run": _run_of(frozen)})


def _run_of(trial: Any) -> str:
    return str(trial.user_attrs.get("run", f"trial-{trial.number:04d}"))


def _put_back_orphans(study: Any, sweep: SweepConfig) -> None:
    trials = study.get_trials(deepcopy=True)
    newest = {_run_of(trial): trial.number for trial in trials}
    for trial in trials:
        run = trial.user_attrs.get("run")
        if trial.state.name == "RUNNING" and (run is None or not is_alive(sweep.folder / "runs" / run)):
            put_back(study, trial.number, sweep)
        elif "put_back" in trial.user_attrs and trial.state.name == "FAIL" and newest[_run_of(trial)] == trial.number:
            # whoever put it back came no further: the disk was full, or it was killed
            study.enqueue_trial(trial.params, user_attrs={"run": _run_of(trial)})


def beat(run_dir: Path) -> None:
    """Record that this process works on the trial in run_dir."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / HEARTBEAT, json.dumps(own_process()) + "\n")


def is_alive(run_dir: Path) -> bool:
    """Whether a worker recorded so recently; on the same machine its process is looked up too."""
    file = run_dir / HEARTBEAT
    try:
        text, age = file.read_text(encoding="utf-8"), time.time() - file.stat().st_mtime
    except (OSError, ValueError):
        return False
    try:
        mark = json.loads(text)
    except ValueError:  # "host pid", of version 0.1
        mark = None
    return is_running(mark) is not False and age < STALE_S


def distribution(axis: Axis) -> Any:
    """The axis as an Optuna distribution."""
    kinds = load_optuna().distributions
    if axis.choices:
        return kinds.CategoricalDistribution(axis.choices)
    if axis.is_integer:
        return kinds.IntDistribution(axis.low, axis.high, log=axis.log, step=axis.step or 1)
    return kinds.FloatDistribution(float(axis.low or 0), float(axis.high or 0), log=axis.log, step=axis.step)


def _sampler(optuna: Any, sweep: SweepConfig, count: int) -> Any:
    seed = sweep.seed * 100_003 + count
    if sweep.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(4, sweep.trials // 4)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)


def _pruner(optuna: Any, sweep: SweepConfig) -> Any:
    pruning = sweep.pruning
    if pruning.kind == "none":
        return optuna.pruners.NopPruner()
    if pruning.kind == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_early_stopping_rate=0, min_resource=max(1, pruning.warmup_steps))
    return optuna.pruners.MedianPruner(n_startup_trials=pruning.startup_trials, n_warmup_steps=pruning.warmup_steps)
