"""Ranks forked from one process that has torch, the trainer and DeepSpeed imported already.

    printed = train_in_ranks(recipe, 2, "parallel.strategy=fsdp2")     # as torchrun --nproc-per-node=2 trainer/train.py would
    run_in_ranks(target, 4, arguments, folder)     # target(*arguments), with RANK and the rest in os.environ

The imports take a new process three to four seconds of CPU, which was most of what these tests cost. A rank finds the others
through a store that the test's own process holds at a port of the system's choice, as torchrun's agent does. That torchrun and
accelerate start such ranks is what test_distributed.py and test_accelerate.py show.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
HIDDEN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


@cache
def _context() -> ForkServerContext:
    """The process to fork from, started once. It sees no GPU, also where there is one: these tests run on gloo."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["chatmill.trainer.loop.loop", "accelerate", "deepspeed"]
    )  # what is not installed is passed over
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def train_in_ranks(recipe: Path, processes: int, *overrides: str, fault: str = "", timeout_s: float = 600) -> str:
    """Train a recipe and return what all ranks printed. fault: what goes wrong in it (launcher/doctor/fault_injection.py)."""
    with tempfile.TemporaryDirectory() as folder:
        return run_in_ranks(_train, processes, ([str(recipe), *overrides], fault), Path(folder), timeout_s)


def run_in_ranks(
    target: Callable[..., None], processes: int, arguments: tuple[Any, ...], folder: Path, timeout_s: float = 600
) -> str:
    """Call target(*arguments) in so many processes; returns what they printed. Fails with the log of the first that failed."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # the ranks take the path over, and look for this module there
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {k: v for k, v in os.environ.items() if k not in HIDDEN}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"rank-{rank}.log" for rank in range(processes)]
    group = []
    for rank, log in enumerate(logs):
        place = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        group.append(_context().Process(target=_rank, args=(place, log, target, arguments)))
        group[-1].start()
    deadline = time.monotonic() + timeout_s
    running = list(group)
    while running and not any(process.exitcode for process in group) and time.monotonic() < deadline:
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
        running = [process for process in group if process.exitcode is None]
    for process in running:  # the others would wait in a collective for the one that failed
        process.kill()
        process.join()
    failed = [rank for rank, process in enumerate(group) if process not in running and process.exitcode]
    if failed or running:
        rank = failed[0] if failed else group.index(running[0])
        how = f"ended with {group[rank].exitcode}" if failed else f"did not end within {timeout_s} s"
        raise AssertionError(f"rank {rank} {how}:\n{logs[rank].read_text()[-6000:]}")
    return "".join(log.read_text() for log in logs)


def _rank(environment: dict[str, str], log: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """One forked process."""
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(log.parent)
    code = 1
    try:
        target(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # waits neither for other ranks nor for the threads of DeepSpeed and gloo


def _train(words: list[str], fault: str) -> None:
    from chatmill.launcher.doctor.fault_injection import Fault, install
    from chatmill.trainer.config import load_recipe
    from chatmill.trainer.train import main

    sys.argv = sys.orig_argv = ["trainer/train.py", *words]
    if fault:
        install(Fault(fault, load_recipe(words[0], words[1:]).run_dir))
    code = main(words)
    if code:
        raise SystemExit(code)
