"""`chatmill sweep`: search over recipe fields, here or as a Slurm array, and say which recipe was best.

chatmill sweep SWEEP.yaml [--workers 4]       processes on this machine; the same command continues
chatmill sweep SWEEP.yaml --on slurm          one array element per worker (= sbatch --array=1-4 slurm/sweep.sh SWEEP.yaml)
chatmill sweep SWEEP.yaml --report            table, best.yaml and report.html of the results so far
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import yaml

from chatmill.config import ConfigError
from chatmill.files import replace_text
from chatmill.shell import in_this_shell

from ..jobs.job import JobSpec
from ..jobs.launch import submit
from ..jobs.slurm import render_sweep
from ..jobs.snapshot import new_launch, snapshot_code
from .config import SweepConfig, load_sweep
from .report import table, write_results
from .study import load_optuna


def sweep(options: argparse.Namespace) -> int:
    """The command: returns the exit code."""
    load_optuna()
    file = Path(options.sweep).absolute()
    config = load_sweep(file)
    if options.workers:
        config = config.model_copy(update={"workers": options.workers})
    if options.report:
        return report(config)
    print(f"{config.folder}: {config.trials} trials, {config.workers} at a time, over {', '.join(config.space)}")
    if options.on == "slurm":
        return submit_sweep(config, options.dry_run)
    if options.dry_run:
        words = [sys.executable, "-m", "chatmill.launcher.sweep.worker", str(file)]
        print(f"{config.workers} x {shlex.join(words)}\nnothing was started (--dry-run)")
        return 0
    code = run_workers(config, file)
    return code or report(config)


def report(config: SweepConfig) -> int:
    """Write the results and print the best trials; returns 1 when no trial is complete."""
    trials = write_results(config)
    print(table(config, trials))
    done = [trial for trial in trials if trial.state == "complete"]
    print(f"\nreport  {config.folder / 'report.html'}")
    if not done:
        first = next((trial.error for trial in trials if trial.error), "")
        print("no trial is complete" + (f"; the first failure: {first}" if first else ""))
        return 1
    best = shlex.quote(os.path.relpath(config.folder / "best.yaml"))
    print(in_this_shell(f"best    {config.folder / 'best.yaml'}   (chatmill train {best})"))
    return 0


def run_workers(config: SweepConfig, file: Path) -> int:
    """Start the workers here, each with its own GPUs where a trial takes any; returns the first bad exit code, or 0."""
    per_worker = config.job.gpus_per_node
    workers = []
    for i in range(config.workers):
        environment = dict(os.environ)
        if per_worker:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(i * per_worker + k) for k in range(per_worker))
        command = [sys.executable, "-m", "chatmill.launcher.sweep.worker", str(file)]
        workers.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return next((code for code in codes if code), 0)


def submit_sweep(config: SweepConfig, dry_run: bool) -> int:
    """Submit a job array of workers that run a snapshot of the code and of the sweep file."""
    spec = config.job.model_copy(update={"name": config.name if config.job.name == "chatmill" else config.job.name})
    if spec.container:
        raise ConfigError("job.container: a sweep's workers run on the node itself")
    if dry_run:
        print(render_sweep(spec, config.workers) + "nothing was started (--dry-run)")
        return 0
    with new_launch(config.folder) as folder:
        script = _prepare(config, spec, folder)
    file = folder / "sweep.yaml"
    job = submit(["sbatch", "--parsable", f"--output={folder}/worker-%a.out", str(script)])
    print(
        f"submitted as Slurm job array {job}; then:\n  squeue -j {job}\n  tail -f {folder}/worker-*.out\n"
        + in_this_shell(f"  chatmill sweep {shlex.quote(str(file))} --report")
    )
    return 0


def _prepare(config: SweepConfig, spec: JobSpec, folder: Path) -> Path:
    """Fill the folder of a launch; the job script."""
    file = folder / "sweep.yaml"
    replace_text(file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    code = snapshot_code(folder)
    print(code)
    placed = spec.model_copy(
        update={
            "code": str(code.folder),
            "python": spec.python or sys.executable,
            "arguments": (str(file),),
            "run_dir": str(folder),
        }
    )
    script = folder / "sweep.sh"
    replace_text(script, render_sweep(placed, config.workers))
    return script
