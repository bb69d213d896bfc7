"""Pieces that attention's Triton kernels share: loading tiles, the soft-cap and its slope, the mask; launch arguments."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rules import LOG2E

LOG2E_ = tl.constexpr(LOG2E)
LN2_ = tl.constexpr(0.6931471805599453)
# finite, so that NEVER - NEVER is no NaN: the top of a row that has seen nothing yet
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def tile_row(TILES, tile):
    """One row of the tile map: start, end, low, high, lead, full, tail."""
    at = TILES + tile * 8
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6),
    )  # fmt: skip


@triton.jit
def load_tile(base, at, row: tl.constexpr, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `at` of a tile, `row` elements apart; zero where a row is outside (MASKED) or a channel is padding."""
    channel = tl.arange(0, BLOCK_D)
    offsets = at[:, None] * row + channel[None, :]
    if MASKED:
        if D == BLOCK_D:
            return tl.load(base + offsets, mask=inside[:, None], other=0.0)
        else:
            return tl.load(base + offsets, mask=inside[:, None] & (channel[None, :] < D), other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(base + offsets)
        else:
            return tl.load(base + offsets, mask=channel[None, :] < D, other=0.0)


@triton.jit
def capped(scores, cap2, HAS_CAP: tl.constexpr):
    """Base-2 scores after the soft-cap: cap2 * tanh(scores / cap2); tanh by exp2, which every backend has."""
    if HAS_CAP:
        return cap2 * (1.0 - 2.0 / (1.0 + tl.math.exp2(scores * (2.0 * LOG2E_ / cap2))))
    else:
        return scores


@triton.jit
def seen(at, first, last):
    """Whether rows `at` of a step lie in [first, last), both counted from the step's start; operands broadcast.

    So the sums are made per row, not per element: two comparisons with constants cost less than a difference and one.
    """
    return (at >= first) & (at < last)


@triton.jit
def cap_slope(scores, cap2, HAS_CAP: tl.constexpr):
    """Derivative of the soft-cap at its capped value."""
    if HAS_CAP:
        return 1.0 - (scores / cap2) * (scores / cap2)
    else:
        return 1.0


@triton.jit
def store_tile(base, at, row: tl.constexpr, inside, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """values (rows, BLOCK_D) to rows `at` of a tile, in the type of `base`."""
    channel = tl.arange(0, BLOCK_D)
    keep = inside[:, None] & (channel[None, :] < D)
    tl.store(base + at[:, None] * row + channel[None, :], values.to(base.dtype.element_ty), mask=keep)


def strides_of(*tensors: Tensor) -> list[int]:
    """Row and head strides, in elements; channels are contiguous."""
    return [s for x in tensors for s in x.stride()[:2]]
