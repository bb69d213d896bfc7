"""Which part of each tensor a rank holds, and how it is read back: the bridge between engines and checkpoints.

    for share in shares_of(named_tensors, rank, world_size): ...            # no communication, no gathering
    copy_from(checkpoint, "embed.weight", parameter)                          # reads this rank's rows, nothing else

Of a sharded tensor (DTensor, split along dim 0) a rank gives its own rows. A tensor that every rank holds whole is divided
among the ranks when it is large, and written by one of them when it is small, so that all disks and network cards write at
once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from chatmill.config import ConfigError

from .files import Share

SPLIT_BYTES = 1 << 20  # a whole tensor at least this large is written by all ranks, a smaller one by one of them


class TensorSource(Protocol):
    """What loading needs of a checkpoint."""

    def names(self, group: str = "model") -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def tensor(self, name: str) -> Tensor: ...
    def read(self, name: str, start: int, stop: int) -> Tensor: ...


def shares_of(named: Iterable[tuple[str, str, Tensor]], rank: int, world_size: int) -> Iterator[Share]:
    """This rank's shares of (group, name, tensor)s; over all ranks every element comes exactly once."""
    for group, name, tensor in named:
        share = share_of(group, name, tensor.detach(), rank, world_size)
        if share is not None:
            yield share


def share_of(group: str, name: str, tensor: Tensor, rank: int, world_size: int, split_bytes: int = SPLIT_BYTES) -> Share | None:
    """This rank's share of one tensor, or None where other ranks write it."""
    shape = tuple(tensor.shape)
    if isinstance(tensor, DTensor) and tensor.ndim:
        local, first_row, copy, copies = _local_part(tensor)
        low, high = _rows_of(local.shape[0], copy, copies)
        first_row += low
        local = local[low:high]
    elif tensor.ndim and tensor.nbytes >= split_bytes and tensor.shape[0] >= world_size:
        first_row, high = _rows_of(tensor.shape[0], rank, world_size)
        local = tensor[first_row:high]
    else:
        if zlib.crc32(name.encode()) % world_size != rank:
            return None
        first_row, local = 0, local_of(tensor)
    if local.numel() == 0 and tensor.numel():
        return None
    return Share(group, name, shape, first_row * prod(shape[1:]), local)


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, whole or a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_range(tensor: Tensor) -> tuple[int, int]:
    """Elements [start, stop) of the flattened tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    local, first_row, _, _ = _local_part(tensor)
    start = first_row * prod(tensor.shape[1:])
    return start, start + local.numel()


def copy_from(source: TensorSource, name: str, target: Tensor) -> None:
    """Fill target (whole or a DTensor) with the stored tensor; a rank reads its own rows only. Raises ConfigError."""
    _check_shape(source, name, target)
    start, stop = local_range(target)
    local = local_of(target)
    with torch.no_grad():
        local.copy_(source.read(name, start, stop).reshape(local.shape))


def read_like(source: TensorSource, name: str, parameter: Tensor) -> Tensor:
    """A new tensor with the stored values (and dtype), on the device and with the sharding of `parameter`."""
    start, stop = local_range(parameter)
    made = torch.empty_like(parameter.detach(), dtype=source.read(name, start, min(stop, start + 1)).dtype)
    copy_from(source, name, made)
    return made


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor with the device, dtype and sharding of a parameter."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    return distribute_rows(tensor, parameter)


def distribute_rows(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, sharded by rows as the parameter is; dtype and columns stay its own."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    shared = distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    if shared.device == parameter.device:
        return shared
    # offloaded: the shard lives on the CPU, the mesh on the GPU
    local = shared.to_local().to(parameter.device)
    return DTensor.from_local(
        local, mesh, parameter.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    ).to(parameter.device)


def states_by_parameter(source: TensorSource) -> dict[str, list[str]]:
    """{parameter name: keys of its optimizer state} of a checkpoint that stores them as PARAMETER.KEY."""
    found: dict[str, list[str]] = {}
    for name in source.names("optimizer"):
        parameter, _, key = name.rpartition(".")
        found.setdefault(parameter, []).append(key)
    return found


def _check_shape(source: TensorSource, name: str, target: Tensor) -> None:
    if source.shape(name) != tuple(target.shape):
        raise ConfigError(f"checkpoint: {name} has shape {source.shape(name)}, the model expects {tuple(target.shape)}")


def _rows_of(rows: int, part: int, parts: int) -> tuple[int, int]:
    return rows * part // parts, rows * (part + 1) // parts


def _local_part(tensor: DTensor) -> tuple[Tensor, int, int, int]:
    """(local tensor, its first row in the whole, which copy of it this rank holds, how many copies there are)."""
    copy, copies = 0, 1
    coordinate: list[int] = list(tensor.device_mesh.get_coordinate() or [])
    for size, place, at in zip(tensor.device_mesh.shape, tensor.placements, coordinate, strict=True):
        if isinstance(place, Replicate):
            copy, copies = copy * size + at, copies * size
        elif not (isinstance(place, Shard) and place.dim == 0):
            raise ConfigError(f"checkpoints hold tensors split along their first dimension, not {place}")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0] if offset else 0, copy, copies
