"""Triton engine of the linear cross-entropy: contract and maths in linear_cross_entropy.py.

For each chunk of rows
  1. project_kernel: one GEMM tile of the logits; the epilogue takes, from the fp32 accumulator, each row's largest rival
     (logit of a token that is not the target), the rivals' sum of exponentials relative to it, and the target's own logit.
     Only then are the logits rounded and stored; the loss-only path stores none.
  2. finish_rows: the tiles' statistics to lse, loss and hit, on R-sized vectors in torch.
  3. gradient_kernel: the logits become their own gradient in place; the one-hot is subtracted in fp32 before rounding.
  4. d_x by cuBLAS; d_weight summed in fp32 (accumulate_kernel) and cast once. Every output element has one writer: no
     atomics, so results are bitwise repeatable.
Extra memory: one chunk of logits (LOGITS_BYTES) and, where weight is narrower than fp32 and rows need more than one chunk,
d_weight in fp32. Tiles come from a fixed table per architecture: no autotuning at run time.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/test_linear_cross_entropy_triton.py
        python -m chatmill.kernels.cross_compile chatmill.kernels.linear_cross_entropy_cases
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from chatmill.kernels.cross_compile import Case
from chatmill.kernels.interpreter import install, is_interpreting
from chatmill.kernels.vocabulary_shard import Rows, Statistics, VocabularyShard, finish_rows, sum_over

# 4096 rows of a 128k vocabulary in bf16: large enough for full-speed products, the whole extra memory of a short batch
LOGITS_BYTES = 1 << 30
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Tile:
    """Blocks of one product: rows x columns of the result, depth of a step; warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# (architecture, is 16-bit) -> (projection, accumulation)
TILES = {
    (80, True): (Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 4)),
    (90, True): (Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
    (100, True): (Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    (80, False): (Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
}
# rows that are not 16-byte aligned are read element by element, which takes the registers of the larger tiles
UNALIGNED = (Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3))
INTERPRETED = (Tile(32, 64, 32, 4, 1), Tile(32, 64, 32, 4, 1))
GRADIENT_BLOCK = 4096


@triton.jit
def project_kernel(
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
    SOFTCAP: tl.constexpr,
    NEEDS_TOTAL: tl.constexpr,
    STORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Logits (R, V) = X (R, H) @ W (V, H).T with per-tile statistics (R, tiles) of the capped logits."""
    n_row_tiles = tl.cdiv(n_rows, BLOCK_R)
    n_tiles = tl.cdiv(vocabulary, BLOCK_V)
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
        tl.store(LOGITS + at, acc.to(LOGITS.dtype.element_ty), mask=real_row[:, None] & real_column[None, :])
    if SOFTCAP > 0:
        acc = SOFTCAP * (2.0 * tl.sigmoid(acc * (2.0 / SOFTCAP)) - 1.0)  # tanh by what every backend has
    label = tl.load(LABELS + rows, mask=real_row, other=-1).to(tl.int32)
    is_own = columns[None, :] == label[:, None]
    stat = rows.to(tl.int64) * n_tiles + tile
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
def statistics_kernel(
    LOGITS,
    LABELS,
    TILE_MAX,
    TILE_SUM,
    TILE_TOTAL,
    OWN,
    vocabulary,
    logits_stride,
    SOFTCAP: tl.constexpr,
    NEEDS_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """project_kernel's statistics for logits that are there already; one program: BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    WIDE: tl.constexpr = OWN.dtype.element_ty
    z = tl.load(LOGITS + row * logits_stride + columns, mask=inside, other=0.0).to(WIDE)
    if SOFTCAP > 0:
        z = SOFTCAP * (2.0 * tl.sigmoid(z * (2.0 / SOFTCAP)) - 1.0)
    label = tl.load(LABELS + row).to(tl.int32)
    stat = row * tl.num_programs(1) + tile
    if NEEDS_TOTAL:
        tl.store(TILE_TOTAL + stat, tl.sum(tl.where(inside, z, 0.0), 0))
    is_own = columns == label
    tl.store(OWN + row, tl.sum(tl.where(is_own, z, 0.0), 0), mask=(label >= tile * BLOCK) & (label < (tile + 1) * BLOCK))
    rival = tl.where(is_own | (columns >= vocabulary), -float("inf"), z)
    top = tl.max(rival, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    tl.store(TILE_MAX + stat, top)
    tl.store(TILE_SUM + stat, tl.sum(tl.exp(rival - shift), 0))


@triton.jit
def gradient_kernel(
    LOGITS,
    OUT,
    LABELS,
    OWN,
    TOP,
    P_SCALE,
    HIT_SCALE,
    FLOOR,
    vocabulary,
    logits_stride,
    out_stride,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT = (P_SCALE * exp(z - TOP) - HIT_SCALE * [is target] - FLOOR) * softcap', 0 where P_SCALE is 0; OUT may be LOGITS."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    WIDE: tl.constexpr = OWN.dtype.element_ty
    z = tl.load(LOGITS + row * logits_stride + columns, mask=inside, other=0.0).to(WIDE)
    if SOFTCAP > 0:
        z = SOFTCAP * (2.0 * tl.sigmoid(z * (2.0 / SOFTCAP)) - 1.0)
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


@triton.jit
def accumulate_kernel(
    G,
    X,
    TOTAL,
    n_rows,
    vocabulary,
    width,
    g_stride,
    x_stride,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """TOTAL (V, H) += G (R, V).T @ X (R, H); TOTAL is contiguous and wide, each tile has one writer."""
    n_wide = tl.cdiv(width, BLOCK_H)
    column0 = (tl.program_id(0) // n_wide) * BLOCK_V
    h0 = (tl.program_id(0) % n_wide) * BLOCK_H
    columns = column0 + tl.arange(0, BLOCK_V)
    hs = h0 + tl.arange(0, BLOCK_H)
    WIDE: tl.constexpr = TOTAL.dtype.element_ty
    at = TOTAL + columns.to(tl.int64)[:, None] * width + hs[None, :]
    mask = (columns < vocabulary)[:, None] & (hs < width)[None, :]
    acc = tl.load(at, mask=mask, other=0.0)
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
    tl.store(at, acc, mask=mask)


def run_triton(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_x: bool,
    need_weight: bool,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses (R,), lse (R,), hits (R,), d_x, d_weight): the Triton counterpart of run_torch."""
    if is_interpreting():
        install()
    x, labels = x.contiguous(), labels.contiguous()
    n_rows, vocabulary = x.shape[0], weight.shape[0]
    total = shard.vocabulary if shard else vocabulary
    projection = weight.to(x.dtype).contiguous()
    sums = torch.float64 if x.dtype is torch.float64 else torch.float32
    losses = x.new_empty(n_rows, dtype=sums)
    lse, hits = torch.empty_like(losses), x.new_empty(n_rows, dtype=torch.bool)
    gradients = coefficients is not None and (need_x or need_weight)
    d_x = torch.empty_like(x) if need_x else x.new_empty(0)
    size = chunk_rows(n_rows, vocabulary, x.element_size()) if gradients else max(1, min(n_rows, CHUNK_ROWS))
    d_weight = WeightGradient(weight, x, n_chunks=-(-n_rows // size)) if need_weight else None
    buffer = logits_buffer(size, vocabulary, x) if gradients else None
    for start in range(0, n_rows, size):
        part = slice(start, min(start + size, n_rows))
        logits = None if buffer is None else buffer[: part.stop - start]
        stats = project(x[part], projection, labels[part], logits, softcap, label_smoothing > 0)
        rows = finish_rows(stats, total, label_smoothing, z_loss, shard)
        lse[part], losses[part], hits[part] = rows[:3]
        if logits is None or coefficients is None:
            continue
        gradient = logits[:, :vocabulary]
        to_gradient(gradient, total, labels[part], stats.own, rows, coefficients[part], label_smoothing, z_loss, softcap)
        if need_x:
            torch.mm(gradient, projection, out=d_x[part])
        if d_weight is not None:
            d_weight.add(gradient, x[part])
    if shard is not None and need_x and gradients:
        sum_over(shard, d_x)
    return losses, lse, hits, d_x, weight.new_empty(0) if d_weight is None else d_weight.result()


def project(x: Tensor, weight: Tensor, labels: Tensor, logits: Tensor | None, softcap: float, needs_total: bool) -> Statistics:
    """Launch project_kernel; logits (R, >= V) is written raw (before the soft-cap) unless it is None."""
    n_rows, width = x.shape
    vocabulary = weight.shape[0]
    tile = tiles(x, weight)[0]
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    n_tiles = triton.cdiv(vocabulary, tile.columns)
    tile_max = x.new_empty((n_rows, n_tiles), dtype=wide)
    tile_sum = torch.empty_like(tile_max)
    total = torch.empty_like(tile_max) if needs_total else None
    own = x.new_full((n_rows,), float("-inf"), dtype=wide)
    described = has_descriptors(x, weight)
    project_kernel[(triton.cdiv(n_rows, tile.rows) * n_tiles,)](
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]) if described else x,
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if described else weight,
        labels,
        x if logits is None else logits,
        tile_max,
        tile_sum,
        tile_max if total is None else total,
        own,
        n_rows,
        vocabulary,
        width,
        x.stride(0),
        weight.stride(0),
        0 if logits is None else logits.stride(0),
        SOFTCAP=softcap,
        NEEDS_TOTAL=needs_total,
        STORE=logits is not None,
        DESCRIPTORS=described,
        PRECISION=precision(x.dtype),
        BLOCK_R=tile.rows,
        BLOCK_V=tile.columns,
        BLOCK_H=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return Statistics(tile_max, tile_sum, total, own)


def statistics(logits: Tensor, labels: Tensor, softcap: float, needs_total: bool) -> Statistics:
    """Launch statistics_kernel on raw logits (R, V) with adjacent columns."""
    n_rows, vocabulary = logits.shape
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(vocabulary))
    tile_max = logits.new_empty((n_rows, triton.cdiv(vocabulary, block)), dtype=wide)
    tile_sum = torch.empty_like(tile_max)
    total = torch.empty_like(tile_max) if needs_total else None
    own = logits.new_full((n_rows,), float("-inf"), dtype=wide)
    statistics_kernel[tile_max.shape](
        logits,
        labels,
        tile_max,
        tile_sum,
        tile_max if total is None else total,
        own,
        vocabulary,
        logits.stride(0),
        SOFTCAP=softcap,
        NEEDS_TOTAL=needs_total,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )
    return Statistics(tile_max, tile_sum, total, own)


def to_gradient(
    logits: Tensor,
    vocabulary: int,
    labels: Tensor,
    own: Tensor,
    rows: Rows,
    coefficients: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    out: Tensor | None = None,
) -> None:
    """Launch gradient_kernel: out (in place without one) becomes d(sum of coefficient x loss) / d(logits (R, V)).

    vocabulary: of the whole head; logits may be one shard's columns of it.
    """
    columns = logits.shape[1]
    out = logits if out is None else out
    p_scale = coefficients * (1 + 2 * z_loss * rows.lse) / rows.sum_exp
    hit_scale = coefficients * (1 - label_smoothing)
    floor = coefficients * (label_smoothing / vocabulary) if label_smoothing else hit_scale
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(columns))
    gradient_kernel[(logits.shape[0], triton.cdiv(columns, block))](
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


class WeightGradient:
    """d_weight over the chunks: fp32 (fp64) sums, cast to weight's dtype once.

    One chunk whose rows are all there needs no sum outside the matrix product, and then no fp32 buffer either.
    """

    def __init__(self, weight: Tensor, x: Tensor, n_chunks: int) -> None:
        self.dtype = weight.dtype
        self.sums = torch.float64 if x.dtype is torch.float64 else torch.float32
        self.shape, self.n_chunks = weight.shape, n_chunks
        self.total: Tensor | None = None if n_chunks else weight.new_zeros(weight.shape)

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """Add gradient (R, V).T @ x (R, H)."""
        if gradient.is_cuda and self.total is None:
            if gradient.dtype is self.sums or (self.n_chunks == 1 and gradient.dtype is self.dtype):
                self.total = torch.mm(gradient.T, x)
            else:
                self.total = torch.mm(gradient.T, x, out_dtype=self.sums)
            return
        if self.total is None:
            self.total = torch.zeros(self.shape, dtype=self.sums, device=x.device)
        accumulate(self.total, gradient, x)

    def result(self) -> Tensor:
        """The gradient in weight's dtype."""
        assert self.total is not None
        return self.total.to(self.dtype)


def accumulate(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Launch accumulate_kernel."""
    n_rows, width = x.shape
    tile = tiles(gradient, x)[1]
    described = has_descriptors(gradient, x)
    grid = (triton.cdiv(gradient.shape[1], tile.rows) * triton.cdiv(width, tile.columns),)
    accumulate_kernel[grid](
        TensorDescriptor.from_tensor(gradient, [tile.depth, tile.rows]) if described else gradient,
        TensorDescriptor.from_tensor(x, [tile.depth, tile.columns]) if described else x,
        total,
        n_rows,
        gradient.shape[1],
        width,
        gradient.stride(0),
        x.stride(0),
        DESCRIPTORS=described,
        PRECISION=precision(x.dtype),
        BLOCK_V=tile.rows,
        BLOCK_H=tile.columns,
        BLOCK_R=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def chunk_rows(n_rows: int, vocabulary: int, element_bytes: int) -> int:
    """Rows of logits that LOGITS_BYTES hold, a multiple of 128 between 128 and CHUNK_ROWS; at least 1, at most n_rows."""
    fit = LOGITS_BYTES // (vocabulary * element_bytes) // 128 * 128
    return max(1, min(n_rows, CHUNK_ROWS, max(128, fit)))


def logits_buffer(n_rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """Uninitialised (rows, >= V) whose row stride is a multiple of 128 elements, so any vocabulary has aligned rows."""
    return like.new_empty((n_rows, triton.cdiv(vocabulary, 128) * 128))


def tiles(*matrices: Tensor) -> tuple[Tile, Tile]:
    """Tiles for the device, dtype and alignment of the operands."""
    first = matrices[0]
    if not first.is_cuda:
        return INTERPRETED
    if not all(is_aligned(m) for m in matrices):
        return UNALIGNED
    generation = min(torch.cuda.get_device_capability(first.device)[0] * 10, 100)
    return TILES.get((generation, first.element_size() == 2)) or TILES[80, first.element_size() == 2]


def is_aligned(matrix: Tensor) -> bool:
    """Whether every row starts on a 16-byte boundary."""
    return matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def has_descriptors(*matrices: Tensor) -> bool:
    """Whether these matrices can be read by the tensor memory accelerator (sm_90 and later; 16-byte rows)."""
    old = matrices[0].is_cuda and torch.cuda.get_device_capability(matrices[0].device)[0] < 9
    return not old and all(m.element_size() == 2 and m.numel() > 0 and is_aligned(m) for m in matrices)


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: as torch.set_float32_matmul_precision says (default: exactly)."""
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def shipped_cases() -> list[Case]:
    """The configurations that ship, for the cross-compilation gates."""
    from chatmill.kernels.linear_cross_entropy_cases import shipped_cases as cases

    return cases()
