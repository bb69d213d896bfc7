"""The stages of a data build as datatrove pipeline steps, run by datatrove's own executors.

    chatmill data build RECIPE executor.kind=slurm executor.partition=cpu executor.tasks=64
    chatmill data build RECIPE executor.kind=datatrove              LocalPipelineExecutor

A stage is the same function of one chunk everywhere (stages.py). On Slurm it becomes one job array whose elements share
its chunks; the process that builds waits for it and does the serial parts. Killed and started again, it finds the array of the
stage by its name in the queue and waits for it, then submits what is still missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

import chatmill
from chatmill.config import ConfigError

from ..recipe import ExecutorSection
from .executor import Task, missing, run_tasks

LOG_LINES = 12
_PLAIN_PATH = re.compile(r"[\w@+=:,./-]+")


class StageStep(PipelineStep):
    """Rank r of a world of W runs the tasks r, r + W, r + 2 W ... of a stage, in `workers` processes."""

    type = "chatmill"

    def __init__(self, folder: Path, names: Sequence[str], task: Task, workers: int) -> None:
        self.name = folder.name
        super().__init__()
        self.folder, self.names, self.task, self.workers = folder, tuple(names), task, workers

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Nothing is passed on: a task writes its files and its done file."""
        share = self.names[rank::world_size]
        run_tasks(self.folder, share, self.task, self.workers)
        self.stat_update("tasks", value=len(share))
        return data or ()


def run_stage(
    folder: Path, names: Sequence[str], task: Task, executor: ExecutorSection, workers: int, tick: Callable[[int], None]
) -> None:
    """Run the tasks `names` of a stage; tick(done files there) reports progress."""
    if executor.kind == "slurm":
        _run_on_slurm(folder, names, task, executor, tick)
        return
    steps = [StageStep(folder, names, task, 1)]
    logs = str(folder / "datatrove" / _first_free(folder / "datatrove"))
    LocalPipelineExecutor(steps, tasks=len(names), workers=min(workers, len(names)), logging_dir=logs).run()
    tick(_finished(folder))


class _JobArray(SlurmPipelineExecutor):
    """datatrove's executor without its second job, which merges statistics that nobody reads here."""

    def launch_merge_stats(self) -> None:
        """The ledgers of the stages are summed by the build itself."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Without --partition where none is asked for: the cluster's default then."""
        return {key: value for key, value in super().get_sbatch_args(max_array).items() if value is not None}


def _run_on_slurm(
    folder: Path, names: Sequence[str], task: Task, executor: ExecutorSection, tick: Callable[[int], None]
) -> None:
    if not _PLAIN_PATH.fullmatch(str(folder)):
        raise ConfigError(f"{folder}: a path in a Slurm script must not contain blanks or quotes. Choose another `out`.")
    # One name per stage and folder: it finds the array again, no matter which build submitted it.
    name = f"chatmill-{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:10]}"
    try:
        if _in_queue(name):
            _wait(name, folder, names, executor, tick)
        left = missing(folder, names)
        if not left:
            return
        logs = folder / "slurm" / _first_free(folder / "slurm")
        with _as_outside_of_a_job():
            _job_array(name, folder, logs, left, task, executor).run()
        _wait(name, folder, names, executor, tick)
    except KeyboardInterrupt:
        print(f"\n{name} keeps running; the same command waits for it. To cancel it: scancel --name={name}", file=sys.stderr)
        raise
    left = missing(folder, names)
    if left:
        raise ConfigError(f"{folder.name}: {len(left)} of {len(names)} tasks did not finish on Slurm.\n{_log(logs)}")


def _job_array(
    name: str, folder: Path, logs: Path, left: Sequence[str], task: Task, executor: ExecutorSection
) -> SlurmPipelineExecutor:
    path = os.pathsep.join(filter(None, [str(Path(chatmill.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = [
        f"export PATH={shlex.quote(sysconfig.get_path('scripts'))}:$PATH",
        f"export PYTHONPATH={shlex.quote(path)} TOKENIZERS_PARALLELISM=false",
    ]
    options = {key: getattr(executor, key) for key in ("account", "reservation", "constraint") if getattr(executor, key)}
    return _JobArray(
        [StageStep(folder, left, task, executor.cpus)],
        tasks=min(executor.tasks, len(left)),
        workers=executor.running or -1,
        time=executor.time,
        partition=executor.partition,
        qos=executor.qos,
        cpus_per_task=executor.cpus,
        mem_per_cpu_gb=executor.memory_gb,
        job_name=name,
        env_command="\n".join([*executor.setup, *environment]),
        logging_dir=str(logs),
        slurm_logs_folder=str(logs / "out"),
        # Near its time limit an element goes back to the queue; its finished tasks stay finished.
        sbatch_args={"signal": "USR1@60", "open-mode": "append", **options},
        srun_args={"cpus-per-task": executor.cpus},  # srun does not take it over from sbatch since Slurm 22.05
    )


def _wait(name: str, folder: Path, names: Sequence[str], executor: ExecutorSection, tick: Callable[[int], None]) -> None:
    """Until every task is done or the array has left the queue."""
    pause_s, gone = 0.2, 0
    while missing(folder, names) and gone < 3:  # a network file system may show the last done files late
        tick(_finished(folder))
        time.sleep(pause_s)
        gone = 0 if _in_queue(name) else gone + 1
        pause_s = min(2 * pause_s, executor.poll_s)
    tick(_finished(folder))


def _in_queue(name: str) -> bool:
    """Is a job of this name waiting or running? A controller that does not answer counts as yes: better wait than run twice."""
    words = ["squeue", "--noheader", f"--user={os.getuid()}", f"--name={name}", "--format=%i"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("executor.kind=slurm: no squeue here. Build on a machine that can submit Slurm jobs.") from error
    return bool(done.returncode or done.stdout.strip())


@contextlib.contextmanager
def _as_outside_of_a_job() -> Iterator[None]:
    """Without the variables of a job that this build may be: datatrove would take itself for an element, srun obey limits."""
    inherited = [key for key in os.environ if key.startswith(("SLURM_", "SRUN_")) and key != "SLURM_CONF"]
    held = {key: os.environ.pop(key) for key in inherited}
    try:
        yield
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise ConfigError(f"executor.kind=slurm: the job array was not submitted ({error}).") from error
    finally:
        os.environ.update(held)


def _finished(folder: Path) -> int:
    return sum(entry.name.endswith(".done") for entry in os.scandir(folder))


def _first_free(folder: Path) -> str:
    """001, 002 ...: the completions of one submission say nothing about the tasks of the next."""
    return f"{1 + len(list(folder.glob('*'))):03d}"


def _log(logs: Path) -> str:
    """The last lines of an element that failed."""
    files = sorted((logs / "out").glob("*.out"), key=lambda file: file.stat().st_mtime)
    texts = {file: file.read_text(encoding="utf-8", errors="replace") for file in files}
    bad = [file for file in files if "Error" in texts[file] or "error" in texts[file]] or files
    if not bad:
        return f"No output in {logs}: the array was cancelled, or could not start."
    return f"{bad[0]}:\n" + "\n".join(texts[bad[0]].rstrip().split("\n")[-LOG_LINES:])
