"""Tile sizes per GPU generation and shape class, and the device form of a tile plan.

    plan = plan_attention(cu_seqlens, T, head_dim=64, device=torch.device("cuda"))      # in the collator, on the CPU
    plan = plan.to("cuda", non_blocking=True)                                           # one copy
    attention(q, k, v, cu_seqlens=cu_seqlens, plan=plan)                                # waits for nothing

tuning/attention.json is static, the same on every rank: its first row that fits (compute capability, bytes per element, head
dimension, layout) gives [rows of a query tile, keys of a key tile, warps, pipeline stages] per kernel. The layout is "short"
where the documents' mean length is below SHORT tokens: small tiles waste less at document edges.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dispatch import capability
from .plan import COLUMNS, make_plan, visible_intervals

TABLE = Path(__file__).resolve().parents[1] / "tuning" / "attention.json"
# mean document length (tokens) under which a layout counts as short
SHORT = 256


class TileConfig(NamedTuple):
    """Rows of a query tile, keys of a key tile, warps, software pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class KernelConfig(NamedTuple):
    """Tiles of the three kernels."""

    forward: TileConfig
    dkdv: TileConfig
    dq: TileConfig


# forward of the Hopper tier by head dimension: two groups of 64 rows, keys per step, warps of a group, places of the K/V ring
HOPPER_FORWARD = {64: TileConfig(128, 128, 4, 4), 128: TileConfig(128, 128, 4, 2)}


def padded(channels: int) -> int:
    """Power of two that holds a head's channels, at least 16 (the smallest matrix operand)."""
    return max(16, 1 << (channels - 1).bit_length())


@functools.lru_cache(maxsize=1)
def tuning_rows() -> tuple[dict[str, Any], ...]:
    """Rows of the shipped table."""
    return tuple(json.loads(TABLE.read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=256)
def kernel_config(arch: int, element_bytes: int, head_dim: int, short: bool) -> KernelConfig:
    """First row of the table that fits; ValueError where none does. arch: 90 for Hopper, 0 for the interpreter."""
    for row in tuning_rows():
        fits = row["arch"][0] <= arch <= row["arch"][1] and element_bytes <= row["bytes"] and head_dim <= row["max_dim"]
        if fits and row.get("short", short) == short:
            return KernelConfig(*(TileConfig(*row[kernel]) for kernel in KernelConfig._fields))
    raise ValueError(f"attention: no tile sizes for compute capability {arch}, {element_bytes} bytes, head_dim {head_dim}.")


@dataclass(frozen=True)
class DevicePlan:
    """Tile lists of one batch as a single int32 tensor, so that one copy moves them.

    data: the three tile lists (forward, dkdv, dq; COLUMNS numbers a tile), then visible_intervals (4 x T).
    header: tiles of the three lists, T, causal, window, the tile sizes of the three kernels: 18 numbers.
    """

    data: Tensor
    header: tuple[int, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DevicePlan:
        return DevicePlan(self.data.to(device, non_blocking=non_blocking), self.header)

    def pin_memory(self) -> DevicePlan:
        return DevicePlan(self.data.pin_memory(), self.header)

    @property
    def tokens(self) -> int:
        """Rows of the batch, T."""
        return self.header[3]

    @property
    def causal(self) -> bool:
        return bool(self.header[4])

    @property
    def window(self) -> int:
        """Tokens seen by a query; 0: all."""
        return self.header[5]

    @property
    def config(self) -> KernelConfig:
        numbers = self.header[6:18]
        return KernelConfig(*(TileConfig(*numbers[i : i + 4]) for i in (0, 4, 8)))

    def _list(self, i: int) -> Tensor:
        first = sum(self.header[:i])
        return self.data[first * COLUMNS : (first + self.header[i]) * COLUMNS].view(-1, COLUMNS)

    @property
    def forward(self) -> Tensor:
        return self._list(0)

    @property
    def dkdv(self) -> Tensor:
        return self._list(1)

    @property
    def dq(self) -> Tensor:
        return self._list(2)

    @property
    def bounds(self) -> Tensor:
        return self.data[sum(self.header[:3]) * COLUMNS :]


def plan_attention(
    cu_seqlens: NDArray[np.integer] | Sequence[int],
    T: int,
    *,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    causal: bool = True,
    device: torch.device | None = None,
    config: KernelConfig | None = None,
    impl: str = "auto",
) -> DevicePlan:
    """Plan of one batch, on the CPU.

    head_dim: the larger of the key and value channels. device: where the kernels will run (its generation sets the tile sizes).
    config: tile sizes to use in place of the table's. impl="hopper": for that tier.
    """
    bounds: NDArray[np.int64] = np.asarray(cu_seqlens, dtype=np.int64)
    if config is None:
        documents = int(np.count_nonzero(np.diff(bounds)))
        short = int(bounds[-1]) < SHORT * documents
        arch = 0 if device is None else capability(device)
        config = kernel_config(arch, dtype.itemsize, head_dim, short)
        if impl == "hopper":
            config = config._replace(forward=HOPPER_FORWARD.get(head_dim, config.forward))
    lists = [
        make_plan(bounds, config.forward.block_m, config.forward.block_n, window, causal=causal, T=T),
        make_plan(bounds, config.dkdv.block_n, config.dkdv.block_m, window, causal=causal, side="key", T=T),
        make_plan(bounds, config.dq.block_m, config.dq.block_n, window, causal=causal, T=T),
    ]
    data = np.concatenate([x.ravel() for x in (*lists, visible_intervals(bounds, T, window, causal=causal))])
    header = (*(len(x) for x in lists), T, int(causal), window or 0, *config.forward, *config.dkdv, *config.dq)
    return DevicePlan(torch.from_numpy(data), header)
