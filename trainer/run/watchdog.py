"""Names a hung rank, with its stack, within train.hang_timeout_s, and ends the group so that it can be started again.

    with Watchdog(world, timeout_s, folder) as watchdog:
        watchdog.beat("backward", step)        # the training thread, at each section of a step

A thread per rank checks when its training thread last reported where it is, and tells the other ranks through the store of the
process group (over its own connection). When nothing moves for timeout_s, every rank that is alive writes the stacks of all its
threads to logs/hang-rank-N.txt and works out which ranks are to blame: those whose watchdog is silent (stopped, swapping, a
dead machine), else those furthest behind, else those that wait for no other. Until the first step is done three times as long
is allowed, for loading and compilation. For a process that was itself stopped (Ctrl-Z, a closed laptop) the time starts again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from ..distributed.world import World
from .folder import RunFolder

EXIT_CODE = 70
_KEY = "chatmill/beat/"


@dataclass(frozen=True)
class Beat:
    """Where a rank's training thread is. tick counts the rank's own messages; age_s: since it moved; waits: in a collective."""

    step: int
    place: int
    section: str
    age_s: float
    tick: int
    waits: bool
    frame: str


class Watchdog:
    """on_hang: what to do about a hang; by default end the process (os._exit). timeout_s 0 turns the watchdog off."""

    def __init__(self, world: World, timeout_s: float, folder: RunFolder, on_hang: Callable[[str], None] | None = None) -> None:
        self.world, self.timeout_s, self.folder = world, timeout_s, folder
        self._on_hang = on_hang or self._leave
        self._main = threading.get_ident()
        self._place, self._section, self._step = 0, "start", 0
        self._moved = time.monotonic()
        self._first_step_done = self._paused = False
        self._tick = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None

    def beat(self, section: str, step: int) -> None:
        """The training thread reached a section of a step (a few hundred nanoseconds)."""
        self._first_step_done = self._first_step_done or step > self._step > 0
        self._place = self._place + 1 if step == self._step else 0
        self._section, self._step = section, step
        self._moved = time.monotonic()

    def __enter__(self) -> Self:
        """Watch the calling thread from now on."""
        if self.timeout_s <= 0:
            return self
        self._main, self._moved = threading.get_ident(), time.monotonic()
        if self.world.world_size > 1:
            default: Any = dist.distributed_c10d._get_default_store()
            self._store = default.clone()  # the training blocks its own connection while it waits
            self._store.set_timeout(timedelta(seconds=max(5.0, self.interval_s)))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context nothing counts as a hang: for work of unknown length that is done once."""
        self._paused = True
        try:
            yield
        finally:
            self._moved, self._paused = time.monotonic(), False

    @property
    def interval_s(self) -> float:
        """Seconds between two checks."""
        return min(10.0, max(0.05, self.timeout_s / 10))

    @property
    def limit_s(self) -> float:
        """How long the training thread may stand still at present."""
        return self.timeout_s * (1 if self._first_step_done else 3)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.interval_s):
            now = time.monotonic()
            if now - last > self.interval_s + self.timeout_s / 2:
                self._moved = now  # this thread stood still too: the whole process was stopped
            last = now
            self._tell()
            if not self._paused and now - self._moved > self.limit_s:
                self._report()
                return

    def _tell(self) -> None:
        self._tick += 1
        beat = self._own_beat()
        if self._store is not None:
            try:
                self._store.set(f"{_KEY}{self.world.rank}", json.dumps(beat.__dict__))
            except (RuntimeError, OSError):
                return  # the store's process is gone or stopped: the other ranks will look silent, and be reported

    def _own_beat(self) -> Beat:
        frame = sys._current_frames().get(self._main)
        innermost = frame.f_code.co_filename if frame is not None else ""
        waits = any(part in innermost for part in ("torch/distributed/", "torch/autograd/", "deepspeed/comm/"))
        frames = stack_of(frame)
        age = time.monotonic() - self._moved
        return Beat(self._step, self._place, self._section, round(age, 3), self._tick, waits, " > ".join(frames[-4:]))

    def _beats(self) -> dict[int, Beat]:
        found: dict[int, Beat] = {self.world.rank: self._own_beat()}
        for rank in range(self.world.world_size):
            if rank != self.world.rank and self._store is not None:
                try:
                    if self._store.check([f"{_KEY}{rank}"]):
                        found[rank] = Beat(**json.loads(self._store.get(f"{_KEY}{rank}")))
                except (RuntimeError, OSError):
                    continue
        return found

    def _report(self) -> None:
        logs = self.folder.path / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        stacks = logs / f"hang-rank-{self.world.rank}.txt"
        with (
            contextlib.suppress(OSError),
            stacks.open("w", encoding="utf-8") as handle,
        ):  # a full disk must not block the report
            faulthandler.dump_traceback(handle, all_threads=True)
        before = self._beats()
        for _ in range(3):  # long enough for every living rank to report again
            time.sleep(self.interval_s)
            self._tell()
        after = self._beats()
        blamed, why = blame(before, after, range(self.world.world_size), self.world.rank)
        standing = round(time.monotonic() - self._moved)
        who = ", ".join(f"rank {rank}" for rank in blamed)
        message = f"hang: nothing moved for {standing} s; {who} {why}"
        for rank, beat in sorted(after.items()):
            silent = " (silent)" if rank in blamed and "no sign of life" in why else ""
            message += f"\n  rank {rank}: step {beat.step}, {beat.section}{silent}, at {beat.frame}"
        message += f"\n  stacks of all threads: {logs}/hang-rank-*.txt"
        if self.world.rank == min(
            rank for rank in range(self.world.world_size) if rank not in blamed or rank == self.world.rank
        ):
            self.folder.event("hang", ranks=blamed, why=why, step=self._step, section=self._section, seconds=standing)
        self._on_hang(message)

    def _leave(self, message: str) -> None:
        first, _, rest = message.partition("\n")
        with contextlib.suppress(OSError):
            os.write(2, f"HangError: {first}\n{rest}\n".encode())
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if error_file:  # what torchrun's @record would have written
            extra = {"timestamp": str(int(time.time())), "py_callstack": rest}
            text = json.dumps({"message": {"message": f"HangError: {first}", "extraInfo": extra}})
            with contextlib.suppress(OSError):
                Path(error_file).parent.mkdir(parents=True, exist_ok=True)
                Path(error_file).write_text(text, encoding="utf-8")
        os._exit(EXIT_CODE)


def blame(before: Mapping[int, Beat], after: Mapping[int, Beat], ranks: Sequence[int], own: int) -> tuple[list[int], str]:
    """(ranks, why): the silent ones, else those furthest behind, else those that wait for no other, else all."""
    silent = [
        rank
        for rank in ranks
        if rank != own and (rank not in after or (rank in before and after[rank].tick == before[rank].tick))
    ]
    if silent:
        return silent, "gave no sign of life (stopped, swapping, or its machine is gone)"
    first = min((beat.step, beat.place) for beat in after.values())
    behind = [rank for rank, beat in after.items() if (beat.step, beat.place) == first]
    if len(behind) < len(after):
        return sorted(behind), f"did not get past `{after[behind[0]].section}` of step {first[0]}; the others wait"
    busy = [rank for rank, beat in after.items() if not beat.waits]
    if busy and len(busy) < len(after):
        return sorted(busy), f"computes in `{after[busy[0]].section}` of step {first[0]}; the others wait in a collective"
    if len(after) == 1:
        return sorted(after), f"stands in `{after[own].section}` of step {first[0]}"
    return sorted(after), f"all stand in `{after[own].section}` of step {first[0]}: a collective or the network hangs"


def stack_of(frame: FrameType | None) -> list[str]:
    """`function (file:line)` from the outermost frame to the innermost."""
    names: list[str] = []
    while frame is not None:
        code = frame.f_code
        names.append(f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return names[::-1]
