"""The head's gradient over chunks of rows, d_weight = sum over chunks of G.T @ X, in fp32 without an fp32 copy of it.

    fp32 sum = upper 16 bits, stored where the bf16 result will be, and lower 16 bits in a separate buffer

A bf16 number is the upper half of an fp32 one. So a bf16 weight's sums need 2 bytes per element besides the result instead
of 4 (525 MB instead of 1.05 GB at V=128256, H=2048), exactly: halves are joined, added to in fp32 and split again. The first
chunk reads no sum and the last one writes the rounded result, so there is no pass that clears or casts. Traffic per element:
4 bytes for the first chunk, 8 for each one between, 6 for the last. Other dtypes: fp32 sums (fp64 for fp64), which are the
result itself where weight has that dtype, and are cast at the end for fp16.

Shapes: R rows of a chunk, H model, V vocabulary. Source: own design and code.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import on_its_device
from ..launch import launch
from ..tensors import cdiv, wide_dtype
from . import tiles as shapes
from .torch_products import accumulate_by_torch


@triton.jit
def cross_entropy_accumulate_kernel(
    G,
    X,
    TOTAL,
    LOW,
    n_rows,
    vocabulary,
    width,
    g_stride,
    x_stride,
    SPLIT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """TOTAL (V, H) += G (R, V).T @ X (R, H), or = when FIRST; contiguous, each tile has one writer.

    SPLIT: TOTAL and LOW are int16, the halves of fp32 sums; LAST leaves in TOTAL the bits of the sums rounded to bf16.
    """
    n_wide = tl.cdiv(width, BLOCK_H)
    column0 = (tl.program_id(0) // n_wide) * BLOCK_V
    h0 = (tl.program_id(0) % n_wide) * BLOCK_H
    columns = column0 + tl.arange(0, BLOCK_V)
    hs = h0 + tl.arange(0, BLOCK_H)
    WIDE: tl.constexpr = tl.float32 if SPLIT else TOTAL.dtype.element_ty
    acc = tl.zeros([BLOCK_V, BLOCK_H], WIDE)
    if DESCRIPTORS:
        for r in tl.range(0, n_rows, BLOCK_R):
            acc = tl.dot(G.load([r, column0]).T, X.load([r, h0]), acc, input_precision=PRECISION, out_dtype=WIDE)
    else:
        for r in tl.range(0, n_rows, BLOCK_R):
            rows = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
            real = rows < n_rows
            g_mask = (columns < vocabulary)[:, None] & real[None, :]
            g = tl.load(G + rows[None, :] * g_stride + columns[:, None], mask=g_mask, other=0.0)
            x = tl.load(X + rows[:, None] * x_stride + hs[None, :], mask=real[:, None] & (hs < width)[None, :], other=0.0)
            acc = tl.dot(g, x, acc, input_precision=PRECISION, out_dtype=WIDE)
    # in halves, and after the products: what is there and its conversion would take registers from the pipeline
    left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_V, 2, BLOCK_H // 2]), [0, 2, 1]))
    _add_to(TOTAL, LOW, left, columns, h0, vocabulary, width, SPLIT, FIRST, LAST, BLOCK_H // 2)
    _add_to(TOTAL, LOW, right, columns, h0 + BLOCK_H // 2, vocabulary, width, SPLIT, FIRST, LAST, BLOCK_H // 2)


@triton.jit
def _add_to(
    TOTAL,
    LOW,
    part,
    columns,
    h0,
    vocabulary,
    width,
    SPLIT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """TOTAL[columns, h0 : h0 + BLOCK] += part, as cross_entropy_accumulate_kernel keeps it."""
    hs = h0 + tl.arange(0, BLOCK)
    at = columns.to(tl.int64)[:, None] * width + hs[None, :]
    mask = (columns < vocabulary)[:, None] & (hs < width)[None, :]
    if not FIRST:
        if SPLIT:
            high = tl.load(TOTAL + at, mask=mask, other=0).to(tl.int32)
            low = tl.load(LOW + at, mask=mask, other=0).to(tl.int32)
            part += ((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)
        else:
            part += tl.load(TOTAL + at, mask=mask, other=0.0)
    if SPLIT and LAST:
        tl.store(TOTAL + at, part.to(tl.bfloat16).to(tl.int16, bitcast=True), mask=mask)
    elif SPLIT:
        bits = part.to(tl.int32, bitcast=True)
        tl.store(TOTAL + at, (bits >> 16).to(tl.int16), mask=mask)
        tl.store(LOW + at, bits.to(tl.int16), mask=mask)
    else:
        tl.store(TOTAL + at, part, mask=mask)


class WeightGradient:
    """d_weight (V, H) in weight's dtype, added up over n_chunks chunks.

    by_torch: torch multiplies (torch_products.py), and the fp32 sums of a bf16 weight are kept whole.
    """

    def __init__(self, weight: Tensor, x: Tensor, n_chunks: int, by_torch: bool = False) -> None:
        self.dtype, self.shape, self.device = weight.dtype, weight.shape, weight.device
        self.n_chunks, self.seen = n_chunks, 0
        self.sums = wide_dtype(x.dtype)
        self.by_torch = by_torch
        self.is_split = self.dtype is torch.bfloat16 and self.sums is torch.float32 and not by_torch
        self.total: Tensor | None = None
        self.low: Tensor | None = None

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """Add gradient (R, V).T @ x (R, H)."""
        self.seen += 1
        first, last = self.seen == 1, self.seen == self.n_chunks
        if first and gradient.is_cuda and (last or not self.is_split):
            # the vendor's product where its result is what is wanted: one chunk is all, or the sums are kept whole
            if gradient.dtype is self.sums or (last and gradient.dtype is self.dtype):
                self.total = torch.mm(gradient.T, x)
            else:
                self.total = torch.mm(gradient.T, x, out_dtype=self.sums)
            return
        if self.by_torch:
            if self.total is None:
                self.total = torch.zeros(self.shape, dtype=self.sums, device=self.device)
            accumulate_by_torch(self.total, gradient, x)
            return
        if self.total is None:
            self.total = torch.empty(self.shape, dtype=self.dtype if self.is_split else self.sums, device=self.device)
            if self.is_split and not last:
                self.low = torch.empty(self.shape, dtype=torch.int16, device=self.device)
        accumulate(self.total, gradient, x, self.low, first=first, last=last)
        if last:
            self.low = None

    def result(self) -> Tensor:
        """The gradient in weight's dtype, once all chunks were added."""
        if self.total is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self.total.to(self.dtype)


@on_its_device
def accumulate(
    total: Tensor, gradient: Tensor, x: Tensor, low: Tensor | None = None, *, first: bool = False, last: bool = False
) -> None:
    """Launch the accumulation; total bf16 with low int16 (not needed where first and last) are the halves of fp32 sums."""
    n_rows, width = x.shape
    tile = shapes.tiles(gradient, x)[1]
    described = shapes.has_descriptors(gradient, x)
    is_split = total.dtype is torch.bfloat16
    kept = total.view(torch.int16) if is_split else total
    grid = (cdiv(gradient.shape[1], tile.rows) * cdiv(width, tile.columns),)
    launch(
        cross_entropy_accumulate_kernel,
        grid,
        TensorDescriptor.from_tensor(gradient, [tile.depth, tile.rows]) if described else gradient,
        TensorDescriptor.from_tensor(x, [tile.depth, tile.columns]) if described else x,
        kept,
        kept if low is None else low,
        n_rows,
        gradient.shape[1],
        width,
        gradient.stride(0),
        x.stride(0),
        SPLIT=is_split,
        FIRST=first,
        LAST=last,
        DESCRIPTORS=described,
        PRECISION=shapes.precision(x.dtype),
        BLOCK_V=tile.rows,
        BLOCK_H=tile.columns,
        BLOCK_R=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
