"""The linear cross-entropy in Triton: contract and maths in interface.py.

For each chunk of rows
  1. cross_entropy_project_kernel: one GEMM tile of the logits; the epilogue takes, from the fp32 accumulator, each row's
     largest rival (logit of a token that is not the target), the rivals' sum of exponentials relative to it, and the target's
     own logit.
     Only then are the logits rounded and stored; the loss-only path stores none. Or, where torch multiplies
     (torch_products.py): torch.mm and cross_entropy_statistics_kernel (row_statistics.py).
  2. finish_rows: the tiles' statistics to lse, loss and hit, on R-sized vectors in torch.
  3. cross_entropy_gradient_kernel: the logits become their own gradient in place; the one-hot is subtracted in fp32 before
     rounding.
  4. d_x by cuBLAS; d_weight summed in fp32 and rounded once (weight_gradient.py). Every output element has one
     writer: no atomics, so results are bitwise repeatable.
Extra memory: one chunk of logits and, where a bf16 weight's rows need more than one chunk, the lower halves of d_weight's
fp32 sums. Tiles and chunk come from a fixed table per architecture (tiles.py): no autotuning at run time.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/cross_entropy/test_linear_cross_entropy_triton.py
        python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.cross_entropy
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import capability, on_its_device
from ..launch import launch
from ..tensors import cdiv, next_power_of_2, wide_dtype
from . import tiles as shapes
from .row_statistics import BLOCK, arguments, new_statistics, soft_capped
from .rows import LossOptions, RowResults, Statistics, VocabularyShard, finish_rows, sum_over
from .torch_products import project_by_torch
from .weight_gradient import WeightGradient


@triton.jit
def cross_entropy_project_kernel(
    X,
    W,
    LABELS,
    LOGITS,
    TILE_MAX,
    TILE_SUM,
    TILE_TOTAL,
    OWN,
    n_rows,
    vocabulary,
    width,
    x_stride,
    w_stride,
    logits_stride,
    n_stored,
    SOFTCAP: tl.constexpr,
    NEEDS_TOTAL: tl.constexpr,
    STORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Logits (R, V) = X (R, H) @ W (V, H).T with per-tile statistics (tiles, R) of the capped logits.

    n_stored: columns of LOGITS, V or more; a multiple of 16 is stored 16 bytes at a time. What lies beyond V means nothing.
    """
    n_row_tiles = tl.cdiv(n_rows, BLOCK_R)
    # all row tiles of one vocabulary tile run together: W is read from memory once, X stays in L2
    tile = tl.program_id(0) // n_row_tiles
    row0 = (tl.program_id(0) % n_row_tiles) * BLOCK_R
    column0 = tile * BLOCK_V
    rows = row0 + tl.arange(0, BLOCK_R)
    columns = column0 + tl.arange(0, BLOCK_V)
    real_row = rows < n_rows
    real_column = columns < vocabulary
    WIDE: tl.constexpr = OWN.dtype.element_ty
    acc = tl.zeros([BLOCK_R, BLOCK_V], WIDE)
    if DESCRIPTORS:
        for h in tl.range(0, width, BLOCK_H):
            acc = tl.dot(X.load([row0, h]), W.load([column0, h]).T, acc, input_precision=PRECISION, out_dtype=WIDE)
    else:
        x_at = rows.to(tl.int64)[:, None] * x_stride
        w_at = columns.to(tl.int64)[None, :] * w_stride
        for h in tl.range(0, width, BLOCK_H):
            depth = h + tl.arange(0, BLOCK_H)
            inside = depth < width
            x = tl.load(X + x_at + depth[None, :], mask=real_row[:, None] & inside[None, :], other=0.0)
            w = tl.load(W + w_at + depth[:, None], mask=inside[:, None] & real_column[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=WIDE)
    if STORE:
        at = rows.to(tl.int64)[:, None] * logits_stride + columns[None, :]
        tl.store(LOGITS + at, acc.to(LOGITS.dtype.element_ty), mask=real_row[:, None] & (columns < n_stored)[None, :])
    acc = soft_capped(acc, SOFTCAP)
    label = tl.load(LABELS + rows, mask=real_row, other=-1).to(tl.int32)
    is_own = columns[None, :] == label[:, None]
    stat = tile.to(tl.int64) * n_rows + rows  # tiles outermost: the rows of a tile fill whole sectors
    if NEEDS_TOTAL:
        tl.store(TILE_TOTAL + stat, tl.sum(tl.where(real_column[None, :], acc, 0.0), 1), mask=real_row)
    own = tl.sum(tl.where(is_own, acc, 0.0), 1)
    tl.store(OWN + rows, own, mask=real_row & (label >= column0) & (label < column0 + BLOCK_V))
    rival = tl.where(is_own | (columns[None, :] >= vocabulary), -float("inf"), acc)
    top = tl.max(rival, 1)
    # a tile that holds nothing but the target has no rival: shift by 0, so that exp(-inf) is 0 and not nan
    shift = tl.where(top == -float("inf"), 0.0, top)
    tl.store(TILE_MAX + stat, top, mask=real_row)
    tl.store(TILE_SUM + stat, tl.sum(tl.exp(rival - shift[:, None]), 1), mask=real_row)


@triton.jit
def cross_entropy_gradient_kernel(
    LOGITS,
    OUT,
    LABELS,
    OWN,
    TOP,
    P_SCALE,
    HIT_SCALE,
    FLOOR,
    n_columns,
    logits_stride,
    out_stride,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT = (P_SCALE * exp(z - TOP) - HIT_SCALE * [is target] - FLOOR) * softcap', 0 where P_SCALE is 0; OUT may be LOGITS."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    WIDE: tl.constexpr = OWN.dtype.element_ty
    z = tl.load(LOGITS + row * logits_stride + columns, mask=inside, other=0.0).to(WIDE)
    z = soft_capped(z, SOFTCAP)
    label = tl.load(LABELS + row).to(tl.int32)
    is_own = columns == label
    # the target's logit before it was rounded for storage: probability - 1 is the largest entry of the row
    z = tl.where(is_own, tl.load(OWN + row), z)
    scale = tl.load(P_SCALE + row)
    gradient = scale * tl.exp(z - tl.load(TOP + row)) - tl.where(is_own, tl.load(HIT_SCALE + row), 0.0)
    if SMOOTHING:
        gradient -= tl.load(FLOOR + row)
    if SOFTCAP > 0:
        capped = z / SOFTCAP
        gradient *= 1.0 - capped * capped
    gradient = tl.where(scale == 0.0, 0.0, gradient)
    tl.store(OUT + row * out_stride + columns, gradient.to(OUT.dtype.element_ty), mask=inside)


@on_its_device
def run_triton(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor | None,
    options: LossOptions,
    needs: tuple[bool, bool],
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses (R,), lse (R,), hits (R,), d_x, d_weight): the Triton counterpart of run_torch."""
    need_x, need_weight = needs
    x, labels = x.contiguous(), labels.contiguous()
    n_rows, vocabulary = x.shape[0], weight.shape[0]
    total = shard.vocabulary if shard else vocabulary
    projection = weight.to(x.dtype).contiguous()
    losses = x.new_empty(n_rows, dtype=wide_dtype(x.dtype))
    lse, hits = torch.empty_like(losses), x.new_empty(n_rows, dtype=torch.bool)
    gradients = coefficients is not None and (need_x or need_weight)
    by_torch = shapes.products(options.products, x) == "torch"
    d_x = torch.empty_like(x) if need_x else x.new_empty(0)
    size = max(1, min(n_rows, shapes.CHUNK_ROWS))
    if gradients:
        size = shapes.chunk_rows(n_rows, vocabulary, x.element_size(), capability(x.device))
    d_weight = WeightGradient(weight, x, -(-n_rows // size), by_torch) if need_weight else None
    buffer = shapes.logits_buffer(size, vocabulary, x) if gradients else None
    for start in range(0, n_rows, size):
        part = slice(start, min(start + size, n_rows))
        logits = None if buffer is None else buffer[: part.stop - start]
        stats = (project_by_torch if by_torch else project)(x[part], projection, labels[part], logits, options)
        rows = finish_rows(stats, total, options, shard)
        lse[part], losses[part], hits[part] = rows[:3]
        if logits is None or coefficients is None:
            continue
        gradient = logits[:, :vocabulary]
        # the padding with the rest: rows of whole vectors, whatever the vocabulary; no product reads it
        to_gradient(logits, total, labels[part], stats.own, rows, coefficients[part], options)
        if need_x:
            torch.mm(gradient, projection, out=d_x[part])
        if d_weight is not None:
            d_weight.add(gradient, x[part])
        del gradient
    buffer = logits = None  # before a narrower weight's sums are cast, which takes memory of its own
    if shard is not None and need_x and gradients:
        sum_over(shard, d_x)
    return losses, lse, hits, d_x, weight.new_empty(0) if d_weight is None else d_weight.result()


@on_its_device
def project(x: Tensor, weight: Tensor, labels: Tensor, logits: Tensor | None, options: LossOptions) -> Statistics:
    """Launch the projection; logits (R, >= V), or None, is written raw (before the soft-cap), with no promise beyond V."""
    n_rows, width = x.shape
    vocabulary = weight.shape[0]
    tile = shapes.tiles(x, weight)[0]
    n_tiles = cdiv(vocabulary, tile.columns)
    stats = new_statistics(x, n_tiles, n_rows, options)
    described = shapes.has_descriptors(x, weight)
    launch(
        cross_entropy_project_kernel,
        (cdiv(n_rows, tile.rows) * n_tiles,),
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]) if described else x,
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if described else weight,
        labels,
        x if logits is None else logits,
        *arguments(stats),
        n_rows,
        vocabulary,
        width,
        x.stride(0),
        weight.stride(0),
        0 if logits is None else logits.stride(0),
        0 if logits is None else logits.shape[1],
        SOFTCAP=options.softcap,
        NEEDS_TOTAL=stats.total is not None,
        STORE=logits is not None,
        DESCRIPTORS=described,
        PRECISION=shapes.precision(x.dtype),
        BLOCK_R=tile.rows,
        BLOCK_V=tile.columns,
        BLOCK_H=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return stats


@on_its_device
def to_gradient(
    logits: Tensor,
    vocabulary: int,
    labels: Tensor,
    own: Tensor,
    rows: RowResults,
    coefficients: Tensor,
    options: LossOptions,
    out: Tensor | None = None,
) -> None:
    """Launch cross_entropy_gradient_kernel: out (in place without one) becomes d(sum of coefficient x loss) / d(logits (R, V)).

    vocabulary: of the whole head; logits may be one shard's columns of it, and padding, which then holds anything.
    """
    label_smoothing, z_loss, softcap = options[:3]
    columns = logits.shape[1]
    out = logits if out is None else out
    p_scale = coefficients * (1 + 2 * z_loss * rows.lse) / rows.sum_exp
    hit_scale = coefficients * (1 - label_smoothing)
    floor = coefficients * (label_smoothing / vocabulary) if label_smoothing else hit_scale
    block = min(BLOCK, next_power_of_2(columns))
    launch(
        cross_entropy_gradient_kernel,
        (logits.shape[0], cdiv(columns, block)),
        logits,
        out,
        labels,
        own,
        rows.top,
        torch.where(coefficients == 0, 0.0, p_scale),
        hit_scale,
        floor,
        columns,
        logits.stride(0),
        out.stride(0),
        SOFTCAP=softcap,
        SMOOTHING=label_smoothing > 0,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )
