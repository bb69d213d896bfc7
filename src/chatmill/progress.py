"""How long work shows that it goes on: its phases, the share that is done and the time that is left.

    with LongWork(["weights", "verify"], quiet=options.quiet) as show:
        show("weights", 3, 272)                  # (phase, done, total): begins a phase or moves it on
        show.say("BLEU left out")                # a note for people

Everything goes to stderr, so that --json and pipes stay clean. On a terminal each phase is a line with a bar. Elsewhere a plain
line says where the work is, once in LINE_S seconds and also while nothing is reported; work that ends before writes none.
A call costs about a microsecond: loops may report every item.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TextIO

from chatmill.formatting import duration

Report = Callable[[str, int, int], None]
LINE_S = 10.0


def silent(phase: str, done: int, total: int) -> None:
    """A Report that nobody reads."""


@dataclass(slots=True)
class Phase:
    """One phase. began: when, by the clock of its work; first: what was done then, for example before a build was killed."""

    label: str
    first: int
    total: int
    began: float
    done: int = field(default=0)
    ended: float | None = None

    def words(self, now: float) -> str:
        """ "12 s, about 40 s left": time so far, and what is left of this phase at its mean speed."""
        so_far = duration((self.ended or now) - self.began)
        made = self.done - self.first
        if self.ended is not None or made <= 0 or self.done >= self.total:
            return so_far
        return f"{so_far}, about {duration((now - self.began) / made * (self.total - self.done))} left"

    def line(self, now: float) -> str:
        """The same as a line of a log, with the share that is done."""
        share = f"{self.done:,} of {self.total:,}, " if self.total > 1 else ""
        return f"{self.label}: {share}{self.words(now)}"


class LongWork:
    """Context manager, called as a Report.

    phases: the names of all that will come, in order, for "2/6"; a name that is not among them has no number.
    """

    def __init__(
        self,
        phases: Sequence[str] = (),
        quiet: bool = False,
        stream: TextIO | None = None,
        line_s: float = LINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phases, self.quiet, self.line_s, self.clock = list(phases), quiet, line_s, clock
        self.stream = stream if stream is not None else sys.stderr
        self.current: Phase | None = None
        self._name = ""
        self._bar: Any = None
        self._task: Any = None
        self._over = threading.Event()
        self._talker: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.quiet:
            return self
        self._bar = _terminal_bar(self.stream, self.clock)
        if self._bar is None:
            self._talker = threading.Thread(target=self._talk, name="chatmill-progress", daemon=True)
            self._talker.start()
        return self

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Begin a phase, or move it on: `done` of `total`."""
        if self.quiet:
            return
        if phase != self._name or self.current is None:
            self._begin(phase, done, total)
        assert self.current is not None
        self.current.done, self.current.total = done, total
        if done >= total:
            self._end()

    def say(self, text: str) -> None:
        """A note for people, a line of its own; also where quiet."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(text)

    def _begin(self, name: str, done: int, total: int) -> None:
        self._end()
        self._name = name
        number = f"{self.phases.index(name) + 1}/{len(self.phases)} " if name in self.phases else ""
        self.current = Phase(f"{number}{name}", done, total, self.clock(), done)
        if self._bar is not None:
            self._bar.start()  # not before: what is fetched first may show itself
            self._task = self._bar.add_task(self.current.label, total=None, phase=self.current)

    def _end(self) -> None:
        phase = self.current
        if phase is not None and phase.ended is None:
            phase.done, phase.ended = phase.total, self.clock()

    def _talk(self) -> None:
        """The lines, from a thread of their own: a phase may report nothing for minutes, as one that trains a tokenizer."""
        while not self._over.wait(self.line_s):
            phase = self.current
            if phase is not None and phase.ended is None:
                self._write(phase.line(self.clock()))

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a log on a full disk, or closed: the work goes on
            print(text, file=self.stream, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._end()
        if self._bar is not None:
            self._bar.stop()
        self._over.set()
        if self._talker is not None:
            self._talker.join()


def _terminal_bar(stream: TextIO, clock: Callable[[], float]) -> Any:
    """rich's live display on a terminal that can redraw lines; else None."""
    if not stream.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Share(ProgressColumn):
        """The phase's own counts: a task of rich is never updated, only drawn."""

        def render(self, task: Task) -> Text:
            phase: Phase = task.fields["phase"]
            task.total, task.completed = phase.total, phase.done
            return Text(f"{100 * phase.done / max(1, phase.total):3.0f} %", style="progress.percentage")

    class Left(ProgressColumn):
        """Time so far, and what is left."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["phase"].words(clock()), style="progress.elapsed")

    console = Console(file=stream)
    if not console.is_interactive:  # TERM=dumb
        return None
    columns = (TextColumn("{task.description}", markup=False), Share(), BarColumn(bar_width=24), Left())
    # rich would print on this console, stderr, what the work prints to stdout
    return Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
