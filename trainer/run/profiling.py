"""A profile of a few steps with torch.profiler, on request: `logging.profile_steps: [10, 12]`.

RUN/profile/ then holds trace-rank0.json (open it in https://ui.perfetto.dev or chrome://tracing), operators.txt, the operators
that took the longest, and on a GPU memory-rank0.pickle, every allocation of those steps (https://pytorch.org/memory_viz).
Other steps are not slowed down. Only rank 0 is profiled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..distributed.world import World
from .full_disk import warn

ROWS = 40


class StepProfiler:
    """steps: the first and the last step to profile, or None. done: steps before this attempt."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, world: World, done: int = 0) -> None:
        self.folder, self.world = folder, world
        self.first, self.last = steps if steps is not None and world.is_main else (0, -1)
        self._step = done
        self._profile: profile | None = None
        self._begin_if_due()

    def stepped(self) -> None:
        """One more step is done."""
        self._step += 1
        if self._profile is not None and self._step >= self.last:
            self._end()
        self._begin_if_due()

    def _begin_if_due(self) -> None:
        if self._profile is not None or not self.first - 1 <= self._step < self.last:
            return
        on_gpu = self.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.__enter__()

    def _end(self) -> None:
        assert self._profile is not None
        on_gpu = self.world.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.world.device)
        self._profile.__exit__(None, None, None)
        try:
            self._write(self._profile, on_gpu)
        except (OSError, RuntimeError) as error:  # a full disk costs the profile, not the run
            warn(f"the profile could not be written to {self.folder}: {error}")
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None

    def _write(self, profiled: profile, on_gpu: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rank = self.world.rank
        profiled.export_chrome_trace(str(self.folder / f"trace-rank{rank}.json"))
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = profiled.key_averages().table(sort_by=order, row_limit=ROWS)
        (self.folder / "operators.txt").write_text(f"steps {self.first} to {self.last}\n{table}\n", encoding="utf-8")
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank{rank}.pickle"))
