"""Tile sizes of attention's kernels per GPU generation and shape class: one shipped table, nothing measured at run time.

tuning/attention.json is pinned, the same on every rank: its first row that fits (compute capability, bytes per element, head
dimension, layout) gives [rows of a query tile, keys of a key tile, warps, pipeline stages] per kernel. The layout is "short"
where the documents' mean length is below SHORT tokens: small tiles waste less at document edges.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

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
