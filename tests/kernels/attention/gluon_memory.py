"""What the Gluon simulator models of a GPU's memory: mbarriers, shared places with their history, pointers, TMA descriptors.

gluon_simulator.py runs kernels on it and says what is modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

Clock = dict[str, int]


class SimulationError(Exception):
    """The kernel did what no schedule may do."""


class DeadlockError(SimulationError):
    """Nobody can go on."""


class RaceError(SimulationError):
    """Two accesses to one place in shared memory that nothing orders."""


def join(into: Clock, other: Clock) -> None:
    for actor, time in other.items():
        if into.get(actor, 0) < time:
            into[actor] = time


@dataclass
class Barrier:
    """An mbarrier. `done` phases are over; `clock` is what waiting for the last of them tells."""

    name: str
    count: int = 0
    arrivals: int = 0
    bytes_missing: int = 0
    done: int = 0
    clock: Clock = field(default_factory=dict)
    gathering: Clock = field(default_factory=dict)

    def passes(self, parity: int) -> bool:
        return self.done & 1 != parity

    def arrive(self, count: int, clock: Clock) -> None:
        if self.count == 0:
            raise SimulationError(f"arrival at {self.name}, which was never initialised")
        self.arrivals += count
        if self.arrivals > self.count:
            raise SimulationError(f"{self.name}: {self.arrivals} arrivals in phase {self.done}, it takes {self.count}")
        join(self.gathering, clock)
        self.settle()

    def land(self, size: int, clock: Clock) -> None:
        self.bytes_missing -= size
        if self.bytes_missing < 0:
            raise SimulationError(f"{self.name}: {-self.bytes_missing} more bytes landed than were expected")
        join(self.gathering, clock)
        self.settle()

    def settle(self) -> None:
        if self.arrivals == self.count and self.bytes_missing == 0:
            self.done += 1
            self.arrivals = 0
            join(self.clock, self.gathering)
            self.gathering = {}

    def __str__(self) -> str:
        missing = f", {self.bytes_missing} bytes missing" if self.bytes_missing else ""
        return f"{self.name} ({self.done} phases over, {self.arrivals} of {self.count} arrivals{missing})"


@dataclass
class Place:
    """One slot of a shared buffer: its data, who wrote it last and who has read it since."""

    name: str
    data: Tensor
    writer: tuple[str, int] | None = None
    readers: list[tuple[str, int]] = field(default_factory=list)

    def read_by(self, actor: str, clock: Clock) -> None:
        if self.writer is None:
            raise RaceError(f"{actor} reads {self.name}, which was never written")
        if clock.get(self.writer[0], 0) < self.writer[1]:
            raise RaceError(f"{actor} reads {self.name} without knowing that {self.writer[0]} has ended")
        self.readers.append((actor, clock[actor]))

    def written_by(self, actor: str, clock: Clock) -> None:
        for other, time in [*self.readers, *([self.writer] if self.writer else [])]:
            if clock.get(other, 0) < time:
                raise RaceError(f"{actor} overwrites {self.name} without knowing that {other} has ended")
        self.writer, self.readers = (actor, clock[actor]), []
        self.data.fill_(float("nan"))


class Shared:
    """A buffer in shared memory, or one place of it, as it is or transposed."""

    def __init__(self, places: list[Any], dtype: Any, shape: Sequence[int], turned: bool = False) -> None:
        self.places, self.dtype, self.shape, self.turned = places, dtype, list(shape), turned

    def index(self, i: int) -> Shared:
        if not 0 <= i < len(self.places):
            raise SimulationError(f"index {i} of a buffer of {len(self.places)} places")
        return Shared([self.places[i]], self.dtype, self.shape[1:])

    def permute(self, order: Sequence[int]) -> Shared:
        assert tuple(order) == (1, 0) and len(self.places) == 1
        return Shared(self.places, self.dtype, self.shape[::-1], not self.turned)

    def value(self) -> Tensor:
        data = self.places[0].data
        return (data.t() if self.turned else data).float()


class Pointer:
    """Address in a flat tensor: one, or a tensor of them."""

    def __init__(self, memory: Tensor, stored: Tensor, at: Any = 0) -> None:
        self.memory, self.stored, self.at = memory, stored, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.stored, self.at + offset)

    def chosen(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Flat addresses and mask, of one shape; addresses outside the tensor are an error."""
        at = torch.as_tensor(self.at)
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask
        at, mask = torch.broadcast_tensors(at, mask)
        wrong = mask & ((at < 0) | (at >= self.memory.numel()))
        if wrong.any():
            raise SimulationError(f"global access at {int(at[wrong][0])} of {self.memory.numel()} elements")
        return at.masked_fill(~mask, 0), mask


class Blocks:
    """A host-made TMA descriptor."""

    def __init__(self, desc: TensorDescriptor) -> None:
        self.base = torch.as_strided(desc.base, list(desc.shape), list(desc.strides))
        self.dtype, self.layout = desc.base.dtype, desc.layout
        rows, columns = desc.block_shape
        self.block_type = SimpleNamespace(shape=[rows, columns], nbytes=rows * columns * desc.base.element_size())

    def block(self, row: int, column: int) -> Tensor:
        out = torch.zeros(self.block_type.shape, dtype=self.dtype)
        part = self.base[max(row, 0) : row + out.shape[0], column : column + out.shape[1]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    at, mask = pointer.chosen(mask)
    found = torch.where(mask, pointer.memory[at], torch.as_tensor(other, dtype=pointer.memory.dtype))
    return found if found.dim() else found.item()


def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    at, mask = pointer.chosen(mask)
    value = torch.broadcast_to(value, at.shape)[mask]
    pointer.memory[at[mask]] = value.to(pointer.memory.dtype)
    pointer.stored[at[mask]] += 1
    if (pointer.stored[at[mask]] > 1).any():
        raise SimulationError("an element of global memory is stored twice")
