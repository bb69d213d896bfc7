"""Sharded, asynchronous checkpoints of a training run: training stops only for the copy to host memory.

    saver = CheckpointSaver(world, on_done)
    saver.save(folder, engine.shares(), meta, files)     # collective; waits for the previous save
    ...training goes on...
    problem = saver.wait()                               # "" or why the newest save failed; the same on every rank

Every rank writes the parts of the tensors that it holds into its own files, in a thread. No rank ever holds more of the model
than it trains. When all have written and synced, rank 0 writes the manifest and renames the folder: it is complete or absent.
The threads talk over their own process group, so they never mix with the collectives of training. All ranks must see the same
file system. A full disk costs this checkpoint only: it is reported, training goes on, and the one before it is untouched.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chatmill.files import folder_beside, shared_name

from ..distributed.world import World
from .checkpoint import publish
from .files import Share, merge_parts, write_shares, write_small_file
from .manifest import CheckpointError

SHARD_BYTES = 1 << 30  # safetensors copies a file's tensors once more while it writes


@dataclass(frozen=True)
class SaveResult:
    """How a save ended. stall_s: training stood still; seconds: until it was published; problem: "" or why it failed."""

    meta: Mapping[str, Any]
    stall_s: float
    seconds: float
    problem: str


class CheckpointSaver:
    """One save at a time, in a thread per rank. on_done is called in rank 0's thread, after each save."""

    def __init__(
        self,
        world: World,
        on_done: Callable[[SaveResult], None],
        *,
        asynchronous: bool = True,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.world, self._on_done = world, on_done
        self._asynchronous, self._shard_bytes = asynchronous, shard_bytes
        self._group = dist.new_group(backend="gloo") if world.world_size > 1 else None
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._error: BaseException | None = None

    def save(self, folder: Path, shares: Iterable[Share], meta: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Copy this rank's shares and begin to write them; every rank must call it. Waits for the previous save.

        meta: goes into the manifest. files: small ones by name (config.json ...), which rank 0 writes.
        """
        self.wait()
        began = time.monotonic()
        held = [replace(share, tensor=self._copy(share)) for share in shares]
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        stall_s = time.monotonic() - began
        write = partial(self._write, folder, held, meta, files)
        self._thread = threading.Thread(
            target=self._run, args=(write, meta, began, stall_s), name="checkpoint-writer", daemon=True
        )
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def wait(self) -> str:
        """Wait for the newest save; returns why it failed, or "". The same on every rank. Raises what its thread raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._problem

    def give_up(self, timeout_s: float = 30.0) -> None:
        """On exit: give a save in progress this long to finish."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _copy(self, share: Share) -> Tensor:
        """The share's values in a host buffer that the next save reuses."""
        key = f"{share.group} {share.name}"
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != share.tensor.shape or buffer.dtype != share.tensor.dtype:
            buffer = self._buffers[key] = host_buffer(share.tensor)
        return buffer.copy_(share.tensor, non_blocking=True)

    def _run(self, write: Callable[[], str], meta: Mapping[str, Any], began: float, stall_s: float) -> None:
        try:
            self._problem = write()
            if self.world.is_main:
                self._on_done(SaveResult(meta, stall_s, time.monotonic() - began, self._problem))
        except BaseException as error:  # handed to the training thread, which raises it in wait()
            self._error = error

    def _write(self, folder: Path, shares: list[Share], meta: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
        temporary = shared_name(folder)
        problem, part = "", {}
        with contextlib.ExitStack() as held:
            try:
                if self.world.is_main:
                    held.enter_context(folder_beside(folder, shared=True))
            except OSError as error:
                problem = str(error)
            self._gather("")
            try:
                if not problem:
                    temporary.mkdir(parents=True, exist_ok=True)
                    part = write_shares(temporary, shares, f"rank{self.world.rank:04d}", self._shard_bytes)
            except OSError as error:
                problem = str(error)
            parts = self._gather((f"rank {self.world.rank}: {problem}" if problem else "", part))
            problem = "; ".join(p for p, _ in parts if p)
            if self.world.is_main and not problem:
                try:
                    for name, data in files.items():
                        write_small_file(temporary / name, data)
                    publish(temporary, folder, meta, merge_parts(p for _, p in parts))
                except (OSError, CheckpointError) as error:
                    problem = str(error)
        return str(self._gather(problem)[0])

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value, over the threads' own process group."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def host_buffer(tensor: Tensor) -> Tensor:
    """Host memory of a tensor's shape; page-locked for a tensor on a GPU, where the machine gives such memory.

    Torch rounds page-locked memory up to powers of two, and containers may limit it: ordinary memory then serves, at half the
    speed.
    """
    if tensor.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype)
