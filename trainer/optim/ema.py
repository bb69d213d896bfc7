"""Exponential moving average of the weights: often the better model, at the cost of one more fp32 copy of the weights.

    a <- decay a + (1 - decay) w        after every optimizer step that changed w; a starts as w

The average is fp32, on the device of the master weights and sharded as they are. Checkpoints hold it as `ema.NAME`.

    chatmill export RUN OUT --ema [--to chatmill]     # a Hugging Face folder, or a checkpoint, of the average

Source: Polyak and Juditsky, 1992; Morales-Brotons et al., arXiv:2411.18704.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from chatmill.config import ConfigError
from chatmill.files import folder_beside
from chatmill.progress import Report, silent

from ...data.tokenizer.folder import FILES
from ..checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from ..checkpoint.sharding import local_of

GROUP = "ema"
PREFIX = "ema."


class WeightAverage:
    """The average of fp32 tensors (or DTensors), which are read in place."""

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        assert all(w.dtype == torch.float32 for w in weights), "the average follows the fp32 master weights"
        self.decay = decay
        self._weights = list(weights)
        self.tensors = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def reset(self) -> None:
        """Restart from the current weights."""
        for average, weight in zip(_locals(self.tensors), _locals(self._weights), strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights of one more step."""
        torch._foreach_lerp_(_locals(self.tensors), _locals(self._weights), 1.0 - self.decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the average and the weights, in place; a second call swaps them back exactly."""
        for average, weight in zip(_locals(self.tensors), _locals(self._weights), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


@contextlib.contextmanager
def swapped(exchange: Callable[[], None]) -> Iterator[None]:
    """Within this context the weights and their average are exchanged; both come back exactly."""
    exchange()
    try:
        yield
    finally:
        exchange()


def export_average(source: Checkpoint, out: str | Path, progress: Report = silent) -> Path:
    """Write a checkpoint with the averaged weights of `source`. Raises ConfigError if it holds none."""
    names = source.names(GROUP)
    if not names:
        raise ConfigError(f"{source.path} holds no averaged weights: it was trained without train.ema.")
    files = source.files()
    with CheckpointWriter(out, source.config, {**source.meta, "weights": "ema", "from": str(source.path)}) as writer:
        for number, (name, tensor) in enumerate(source.tensors(GROUP)):
            progress("average", number, len(names))
            writer.add(name.removeprefix(PREFIX), tensor)
        for name in FILES:
            if name in files:
                writer.add_file(name, files[name].read_bytes())
    progress("average", len(names), len(names))
    return Path(out)


@contextlib.contextmanager
def averaged(source: Checkpoint, beside: Path, progress: Report = silent) -> Iterator[Checkpoint]:
    """The averaged weights of a checkpoint as a checkpoint, in a temporary folder next to the given one."""
    with folder_beside(beside.absolute().with_name(f"{beside.name}.averaged")) as folder:
        yield open_checkpoint(export_average(source, folder / "checkpoint", progress))


def _locals(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [local_of(tensor.detach()) for tensor in tensors]
