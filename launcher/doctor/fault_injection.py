"""A training process with one injected fault, which `doctor --faults` and the tests start instead of the trainer.

    CHATMILL_FAULT=nan:1:7 torchrun ... -m chatmill.launcher.doctor.fault_injection RECIPE [section.field=value ...]

CHATMILL_FAULT is KIND:RANK:STEP. At that step (the first is 1) of that rank, and only the first time in the life of a run
folder (RUN/logs/fault.json says when it was; KIND "always-..." is the exception) it
    nan, spike      spoils the loss and the gradients (NaN; times 1000)
    sleep           hangs in Python        stop: stops the whole process (SIGSTOP)
    kill, term, usr1  sends itself the signal, before the step's work
    validation-usr1   sends itself SIGUSR1 in the first validation after that step
    save-kill       kills itself while it writes the checkpoint of that step or a later one
    disk            lets every write of a file beyond 60 KB fail from then on, as on a full disk
    full-disk       lets every write to any file fail for four steps, the run's records and the log too
    raise           raises an error
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from chatmill.files import replace_text

from ...trainer.checkpoint import saver as checkpoint_saver
from ...trainer.config import load_recipe
from ...trainer.engine.engine import Engine, StepSums
from ...trainer.engine.torch_engine import TorchEngine
from ...trainer.engine.zero import ZeroEngine
from ...trainer.loop import validation
from ...trainer.loop.checkpoints import RunCheckpoints
from ...trainer.run.state import TrainState
from ...trainer.train import main

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}
DISK_BYTES = 60_000
FULL_STEPS = 4


class Fault:
    """One fault, from the environment."""

    def __init__(self, text: str, run_dir: Path) -> None:
        self.kind, rank, step = text.split(":")
        self.rank, self.step = int(rank), int(step)
        self.always = self.kind.startswith("always-")
        self.kind = self.kind.removeprefix("always-")
        self.marker = run_dir / "logs" / "fault.json"

    def is_due(self, rank: int, step: int) -> bool:
        """Whether it happens now, at step `step` (from 1) of this rank."""
        return rank == self.rank and step >= self.step and (self.always or not self.marker.exists())

    def note(self, step: int) -> None:
        """Write down that it happens, so that it happens once."""
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"kind": self.kind, "step": step, "rank": self.rank, "time": time.time()})
        replace_text(self.marker, text)


def install(fault: Fault) -> None:
    """Put the fault into this process's trainer."""
    done = [0]  # optimizer steps
    full_since, limits = [math.inf], resource.getrlimit(resource.RLIMIT_FSIZE)
    real_evaluate, real_write = validation.evaluate, checkpoint_saver.write_shares
    real_steps: dict[Any, Any] = {kind: kind.forward_backward for kind in (TorchEngine, ZeroEngine)}
    real_restore = RunCheckpoints.restore

    def restore(checkpoints: RunCheckpoints, *arguments: Any) -> TrainState:
        state = real_restore(checkpoints, *arguments)
        done[0] = state.step
        return state

    def forward_backward(engine: Engine, batches: Any) -> StepSums:
        done[0] += 1
        due = fault.is_due(engine.world.rank, done[0])
        if done[0] - full_since[0] == FULL_STEPS:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
        if due and fault.kind in ("nan", "spike", "sleep", "kill", "term", "usr1", "stop", "raise", "disk", "full-disk"):
            fault.note(done[0])
        if due and fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
        if due and fault.kind == "sleep":
            threading.Event().wait(3600)
        if due and fault.kind == "raise":
            raise RuntimeError("injected error")
        if due and fault.kind == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (DISK_BYTES, DISK_BYTES))
        if due and fault.kind == "full-disk":
            full_since[0] = done[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        sums = real_steps[type(engine)](engine, batches)
        if due and fault.kind in ("nan", "spike"):
            factor = math.nan if fault.kind == "nan" else 1000.0
            for parameter in engine.decoder.parameters():
                if parameter.grad is not None:
                    parameter.grad *= factor
            return StepSums(sums.loss_sum * factor, sums.correct)
        return sums

    def evaluate(*arguments: Any, **options: Any) -> Any:
        if fault.kind == "validation-usr1" and fault.is_due(int(os.environ.get("RANK", "0")), done[0]):
            fault.note(done[0])
            os.kill(os.getpid(), signal.SIGUSR1)
        return real_evaluate(*arguments, **options)

    def write_shares(folder: Path, *arguments: Any) -> Any:
        step = int(folder.name.split("-")[1].split(".")[0])
        if fault.kind == "save-kill" and fault.is_due(int(os.environ.get("RANK", "0")), step):
            (folder / "half-written.safetensors").write_bytes(b"torn")
            fault.note(step)
            os.kill(os.getpid(), signal.SIGKILL)
        return real_write(folder, *arguments)

    replacements: list[tuple[Any, str, Any]] = [
        *((kind, "forward_backward", forward_backward) for kind in real_steps),
        (RunCheckpoints, "restore", restore),
        (validation, "evaluate", evaluate),
        (checkpoint_saver, "write_shares", write_shares),
    ]
    for owner, name, function in replacements:
        setattr(owner, name, function)


def run(arguments: list[str]) -> int:
    """Train with the fault that CHATMILL_FAULT names."""
    if text := os.environ.get("CHATMILL_FAULT"):
        install(Fault(text, load_recipe(arguments[0], arguments[1:]).run_dir))
    return main(arguments)


if __name__ == "__main__":
    code = record(run)(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
