"""A row's statistics in Triton: the largest rival, the rivals' exponentials and the target's logit, of logits that are there.

triton_tier.py takes the same statistics where it multiplies. Contract of the loss: interface.py; maths: rows.py.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/cross_entropy
        python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.cross_entropy
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_its_device
from ..launch import launch
from ..tensors import cdiv, next_power_of_2, wide_dtype
from .rows import LossOptions, Statistics

# columns of one program that reads logits
BLOCK = 4096


@triton.jit
def soft_capped(z, SOFTCAP: tl.constexpr):
    """z after the soft-cap; tanh by what every backend has."""
    if SOFTCAP > 0:
        z = SOFTCAP * (2.0 * tl.sigmoid(z * (2.0 / SOFTCAP)) - 1.0)
    return z


@triton.jit
def cross_entropy_statistics_kernel(
    LOGITS,
    LABELS,
    TILE_MAX,
    TILE_SUM,
    TILE_TOTAL,
    OWN,
    vocabulary,
    n_columns,
    logits_stride,
    SOFTCAP: tl.constexpr,
    NEEDS_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cross_entropy_project_kernel's statistics of given logits; one program: BLOCK columns of one row.

    n_columns: columns that may be read, V or more; a multiple of 16 is read 16 bytes at a time. What lies beyond V is ignored.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    WIDE: tl.constexpr = OWN.dtype.element_ty
    z = tl.load(LOGITS + row * logits_stride + columns, mask=columns < n_columns, other=0.0).to(WIDE)
    z = soft_capped(z, SOFTCAP)
    label = tl.load(LABELS + row).to(tl.int32)
    stat = tile.to(tl.int64) * tl.num_programs(0) + row
    if NEEDS_TOTAL:
        tl.store(TILE_TOTAL + stat, tl.sum(tl.where(inside, z, 0.0), 0))
    is_own = columns == label
    tl.store(OWN + row, tl.sum(tl.where(is_own, z, 0.0), 0), mask=(label >= tile * BLOCK) & (label < (tile + 1) * BLOCK))
    rival = tl.where(is_own | (columns >= vocabulary), -float("inf"), z)
    top = tl.max(rival, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    tl.store(TILE_MAX + stat, top)
    tl.store(TILE_SUM + stat, tl.sum(tl.exp(rival - shift), 0))


@on_its_device
def statistics(
    logits: Tensor, labels: Tensor, options: LossOptions, vocabulary: int | None = None, into: Statistics | None = None
) -> Statistics:
    """Launch cross_entropy_statistics_kernel on raw logits (R, V) with adjacent columns.

    vocabulary: V, where the rows go on with columns that mean nothing. into: statistics to fill, of new_statistics.
    """
    n_rows, vocabulary = logits.shape[0], vocabulary or logits.shape[1]
    block = statistics_block(vocabulary)
    stats = into or new_statistics(logits, cdiv(vocabulary, block), n_rows, options)
    launch(
        cross_entropy_statistics_kernel,
        stats.tile_max.shape,
        logits,
        labels,
        *arguments(stats),
        vocabulary,
        logits.shape[1],
        logits.stride(0),
        SOFTCAP=options.softcap,
        NEEDS_TOTAL=stats.total is not None,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )
    return stats


def statistics_block(vocabulary: int) -> int:
    """Columns of one tile of the statistics."""
    return int(min(BLOCK, next_power_of_2(vocabulary)))


def new_statistics(like: Tensor, n_tiles: int, n_rows: int, options: LossOptions) -> Statistics:
    """For a kernel to fill; tiles lie outermost."""
    tile_max = like.new_empty((n_tiles, n_rows), dtype=wide_dtype(like.dtype)).T
    total = torch.empty_like(tile_max) if options.label_smoothing > 0 else None
    own = like.new_full((n_rows,), float("-inf"), dtype=tile_max.dtype)
    return Statistics(tile_max, torch.empty_like(tile_max), total, own)


def arguments(stats: Statistics) -> tuple[Tensor, ...]:
    """TILE_MAX, TILE_SUM, TILE_TOTAL and OWN of a kernel, which leaves TILE_TOTAL alone where it is not wanted."""
    return stats.tile_max, stats.tile_sum, stats.tile_max if stats.total is None else stats.total, stats.own
