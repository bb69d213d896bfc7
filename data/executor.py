"""Run the tasks of a stage over processes, each at most once even across interruptions.

    results = run_tasks(work / "clean", names, function, workers=4)

A task writes its outputs, then returns a JSON value, which becomes `<folder>/<name>.done`. A task with a done file is not run
again. Results come back in the order of the names, so nothing downstream depends on which worker was faster.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from chatmill.data.shard_index import write_durably

Task = Callable[[str], dict[str, Any]]
Tick = Callable[[int, int], None]


def run_tasks(folder: Path, names: Sequence[str], task: Task, workers: int, tick: Tick | None = None) -> list[dict[str, Any]]:
    """Results of task(name) for every name, in order. task must be picklable; tick(done, total) reports progress."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not _done(folder, name).is_file()]
    finished = len(names) - len(missing)
    if tick:
        tick(finished, len(names))
    if workers <= 1 or len(missing) <= 1:
        for name in missing:
            _run(folder, task, name)
            finished += 1
            if tick:
                tick(finished, len(names))
    else:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context) as pool:
            pending: set[Future[None]] = {pool.submit(_run, folder, task, name) for name in missing}
            try:
                while pending:
                    ready, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in ready:
                        future.result()
                        finished += 1
                        if tick:
                            tick(finished, len(names))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [json.loads(_done(folder, name).read_text(encoding="utf-8")) for name in names]


def _run(folder: Path, task: Task, name: str) -> None:
    write_durably(_done(folder, name), json.dumps(task(name), ensure_ascii=False).encode("utf-8", "backslashreplace"))


def _done(folder: Path, name: str) -> Path:
    return folder / f"{name}.done"
