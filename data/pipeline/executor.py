"""Run the tasks of a stage, each at most once even across interruptions: in processes here, or by datatrove's executors.

    results = run_tasks(work / "clean", names, function, workers=4)

A task writes its outputs, then returns a JSON value, which becomes `<folder>/<name>.done`. A task with a done file is not run
again. Results come back in the order of the names, so nothing downstream depends on which worker was faster.
The done files are the one record of what is finished: a build may change its executor half way.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import write_durably

from ..recipe import ExecutorSection

Task = Callable[[str], dict[str, Any]]
Tick = Callable[[int, int], None]
THREADS = "TOKENIZERS_PARALLELISM"  # read by the package tokenizers


def run_tasks(
    folder: Path,
    names: Sequence[str],
    task: Task,
    workers: int,
    tick: Tick | None = None,
    executor: ExecutorSection | None = None,
) -> list[dict[str, Any]]:
    """Results of task(name) for every name, in order. task must be picklable; tick(done, total) reports progress."""
    folder.mkdir(parents=True, exist_ok=True)
    left = missing(folder, names)
    if tick:
        tick(len(names) - len(left), len(names))
    if executor is not None and executor.kind != "local" and left:
        _steps().run_stage(folder, left, task, executor, workers, lambda done: tick(done, len(names)) if tick else None)
    elif left:
        _run_here(folder, left, task, workers, len(names), tick)
    return [json.loads(_done(folder, name).read_text(encoding="utf-8")) for name in names]


def available_cores() -> int:
    """Cores this process may use; a batch system often grants fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the names that have no done file yet."""
    there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    return [name for name in names if _done(folder, name).name not in there]


def _run_here(folder: Path, left: Sequence[str], task: Task, workers: int, total: int, tick: Tick | None) -> None:
    finished = total - len(left)
    if workers <= 1 or len(left) <= 1:
        for name in left:
            _run(folder, task, name)
            finished += 1
            if tick:
                tick(finished, total)
        return
    with _one_thread_each():
        _run_in_pool(folder, left, task, workers, total, tick)


def _run_in_pool(folder: Path, left: Sequence[str], task: Task, workers: int, total: int, tick: Tick | None) -> None:
    finished = total - len(left)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(workers, len(left)), mp_context=context, initializer=_die_with_parent) as pool:
        pending: set[Future[None]] = {pool.submit(_run, folder, task, name) for name in left}
        try:
            while pending:
                ready, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in ready:
                    future.result()
                    finished += 1
                    if tick:
                        tick(finished, total)
        except BrokenProcessPool as error:
            raise ConfigError(
                f"{folder.name}: a worker process was killed, most likely because memory ran out (workers={workers}).\n"
                "Start the same command again with fewer workers, for example workers=1: it continues where it stopped."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tokenizers of the processes that begin here use one thread. Afterwards they use all cores again, as in training one."""
    asked = THREADS in os.environ
    os.environ.setdefault(THREADS, "false")
    try:
        yield
    finally:
        if not asked:
            del os.environ[THREADS]


def _die_with_parent() -> None:
    """End this worker when the process that made it is gone, even by kill -9; else it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait_for_sentinel([parent.sentinel])
        os._exit(1)  # in the middle of a file, perhaps: such a file has no name yet (write_durably)

    threading.Thread(target=watch, name="chatmill-parent", daemon=True).start()


def _steps() -> Any:
    try:
        return importlib.import_module("chatmill.data.pipeline.datatrove_steps")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("chatmill"):
            raise
        raise ConfigError(
            f"executor.kind: needs the package datatrove ({error}). Install it with: pip install 'chatmill[data]'"
        ) from error


def _run(folder: Path, task: Task, name: str) -> None:
    write_durably(_done(folder, name), json.dumps(task(name), ensure_ascii=False).encode("utf-8", "backslashreplace"))


def _done(folder: Path, name: str) -> Path:
    return folder / f"{name}.done"
