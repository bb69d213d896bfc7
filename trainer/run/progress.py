"""What people see during training: a live bar on a terminal, one line per logged step in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .full_disk import is_full


class StepDisplay:
    """Context manager; `show` per logged step, `say` for messages. Silent where quiet (ranks other than 0)."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self.steps, self.quiet = steps, quiet
        self.console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._first: tuple[int, float] | None = None  # the first step shown, and when: it may include compilation and warm-up
        self._bar: Progress | None = None
        if not quiet and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=steps)

    def starting_at(self, step: int) -> Self:
        """Show a run of which this many steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        return self

    def show(self, step: int, loss: float, lr: float, grad_norm: float, tokens_per_s: float) -> None:
        """step: steps done so far."""
        if self.quiet:
            return
        self._first = self._first or (step, time.monotonic())
        eta = self.eta(step)
        if self._bar is not None:
            text = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:,.0f} tok/s  ETA {eta}"
            self._bar.update(self._task, completed=step, description=text)
            return
        width = len(str(self.steps))
        self._print(
            f"step {step:>{width}}/{self.steps}  loss {loss:.4f}  lr {lr:.2e}  grad norm {grad_norm:.3f}  "
            f"{tokens_per_s:,.0f} tok/s  ETA {eta}"
        )

    def eta(self, step: int) -> str:
        """Time left at the mean speed since the first step shown, as h:mm:ss."""
        if self._first is None or step <= self._first[0]:
            return "-:--"
        done, began = self._first
        left = int((time.monotonic() - began) / (step - done) * (self.steps - step))
        hours, rest = divmod(left, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

    def say(self, text: str) -> None:
        """A message above the bar, or a line of the log."""
        if not self.quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            self.console.print(text)
        except OSError as error:  # a log file on a full disk: the line is lost, the run is not
            if not is_full(error):
                raise

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
