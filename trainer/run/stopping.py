"""Clean stopping: SIGTERM and SIGUSR1 are remembered, and the loop ends at the next step boundary with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

from chatmill.files import replace_text
from chatmill.run_files import PREEMPTED

from .folder import RunFolder


class StopSignal:
    """Remembers that this process received SIGTERM or SIGUSR1."""

    def __init__(self) -> None:
        self.asked = False
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.name = signal.Signals(number).name


def mark_preempted(folder: RunFolder, step: int, name: str) -> None:
    """Leave the mark that tells a launcher to start the run again. name: the signal, "" where another rank received it."""
    replace_text(folder.path / PREEMPTED, f"{name or 'signal on another rank'} at step {step}\n")
    folder.event("preempted", step=step, signal=name)
