"""One worker of a sweep: takes trials until none are left. Started by `chatmill sweep` and by slurm/sweep.sh.

    python -m chatmill.launcher.sweep.worker [--slurm] SWEEP.yaml

A trial is an ordinary training run in SWEEP/runs/trial-0007. Its validation losses are reported as they are measured; a trial
that Optuna prunes is stopped like a preempted run. A worker that is stopped itself puts its trial back, unfinished. With
--slurm (slurm/sweep.sh) it also requeues its job.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from chatmill.config import ConfigError
from chatmill.run_files import PREEMPTED, read_jsonl

from ..jobs.torchrun import single_command, torchrun_command
from ..supervise.slurm_job import SlurmJob
from ..supervise.supervise import Signals, kill_workers
from .config import SweepConfig, load_sweep
from .study import ask, beat, load_optuna, lock, open_study, put_back

GRACE_S = 120.0  # for a trial to save after SIGTERM
Ending = Literal["complete", "pruned", "failed", "stopped"]


def work(sweep: SweepConfig, under_slurm: bool = False) -> int:
    """Take and run trials; returns 0 when none are left."""
    optuna = load_optuna()
    states = optuna.trial.TrialState
    study, signals = open_study(sweep), Signals()
    while not signals.stop:
        trial = ask(study, sweep)
        if trial is None:
            return 0
        run_dir = sweep.folder / "runs" / trial.user_attrs["run"]
        print(f"trial {trial.number}: {describe(trial.params)}", flush=True)
        ending, value = run_trial(sweep, trial, run_dir, signals)
        print(f"trial {trial.number}: {ending}" + (f", {sweep.metric} {value:.4f}" if value is not None else ""), flush=True)
        with lock(sweep.folder):
            if ending == "stopped":
                put_back(study, trial.number, sweep)
            elif ending == "complete":
                study.tell(trial.number, value)
            else:
                study.tell(trial.number, state=states.PRUNED if ending == "pruned" else states.FAIL)
            if sweep.keep_checkpoints == "best":
                drop_checkpoints(study, sweep)
    slurm = SlurmJob.current() if under_slurm else None
    if slurm is not None and not signals.terminated:
        slurm.requeue()
    return 0


def describe(values: dict[str, Any]) -> str:
    """`optimizer.lr=0.0012 model.layers=4`."""
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())


def run_trial(sweep: SweepConfig, trial: Any, run_dir: Path, signals: Signals) -> tuple[Ending, float | None]:
    """Train one trial to its end, its pruning or our stop; returns how it ended and its last validation figure."""
    overrides = sweep.trial_overrides(trial.params, run_dir.name)
    try:
        sweep.trial_recipe(trial.params, run_dir.name)
    except ConfigError as error:
        trial.set_user_attr("error", str(error))
        return "failed", None
    spec = sweep.job.model_copy(update={"arguments": (sweep.recipe, *overrides)})
    python = spec.python or sys.executable
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = single_command(spec, python=python)
    if spec.world_size > 1:
        command = torchrun_command(spec, python=python, log_dir=str(logs))
    with (logs / "trial.out").open("ab") as log:
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(spec.environment) | {"CHATMILL_RUN_DIR": str(run_dir)},
            start_new_session=True,  # Ctrl-C reaches the worker, which passes a SIGTERM on
        )
    reported: dict[int, float] = {}
    pruned, asked = False, 0.0
    while child.poll() is None:
        time.sleep(0.1)
        beat(run_dir)
        for step, value in figures(run_dir, sweep.metric):
            if step > 0 and step not in reported:
                reported[step] = value
                trial.report(value, step)
                pruned = pruned or trial.should_prune()
        if (pruned or signals.stop) and not asked:
            child.send_signal(signal.SIGTERM)
            asked = time.monotonic()
        elif asked and time.monotonic() - asked > GRACE_S:
            child.kill()
            kill_workers(run_dir)
    ended = figures(run_dir, sweep.metric)
    last = ended[-1][1] if ended else None
    if child.returncode == 0 and not (run_dir / PREEMPTED).exists() and last is not None:
        if math.isfinite(last):
            return "complete", last
        trial.set_user_attr("error", f"its last validation is {last}: the training diverged")
        return "failed", last
    if pruned:
        return "pruned", last
    if signals.stop:
        return "stopped", last
    trial.set_user_attr("error", f"exit code {child.returncode}, see {logs / 'trial.out'}")
    return "failed", last


def figures(run_dir: Path, metric: str) -> list[tuple[int, float]]:
    """(step, validation figure) as far as the run has got; NaN where the loss is NaN or infinite, whatever the metric says."""
    rows = [(int(m["step"]), m["eval"]) for m in read_jsonl(run_dir / "metrics.jsonl") if "eval" in m]
    return [(step, float(row[metric]) if math.isfinite(row["loss"]) else math.nan) for step, row in rows]


def drop_checkpoints(study: Any, sweep: SweepConfig) -> None:
    """Delete the checkpoints of all finished trials except the best; they are large and reproducible."""
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    if not complete:
        return
    best = (max if sweep.maximise else min)(complete, key=lambda t: t.value)
    for trial in trials:
        over = trial.state.name in ("COMPLETE", "PRUNED") and trial.number != best.number
        if over and "run" in trial.user_attrs:
            shutil.rmtree(sweep.folder / "runs" / trial.user_attrs["run"] / "checkpoints", ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Work on the sweep file given; the report is updated when this worker has nothing left to do."""
    given = sys.argv[1:] if arguments is None else arguments
    words = [word for word in given if word != "--slurm"]
    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words and words[0] in ("-h", "--help") else 2
    try:
        sweep = load_sweep(Path(words[0]))
        code = work(sweep, under_slurm="--slurm" in given)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from .report import write_results

    write_results(sweep)
    return code


if __name__ == "__main__":
    sys.exit(main())
