"""RMSNorm in Triton: contract and maths in rms_norm.py.

Forward reads x (and the residual) once and writes y (and h). Backward reads h, dy and the residual stream's gradient once;
each of a fixed number of programs sums its rows' share of d_weight in registers and writes one partial row, which torch
adds up: no atomics, so the gradient is bitwise repeatable. The next tiles are loaded while one is computed.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/layer/test_rms_norm.py
        python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.layer
"""

# mypy: disable-error-code="no-untyped-def"
# (triton.jit functions have no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_its_device
from ..launch import launch
from ..tensors import cdiv, next_power_of_2, wide_dtype, with_adjacent_columns

# elements of one tile: with 8192, backward at 4 warps spilled (kernels/gates/layer.py)
TILE = 4096
# of shared memory that tiles in flight may take: sm_86 gives a program 101 kB, sm_90 two of them 113 kB each
SHARED_BYTES = 98_304


@triton.jit
def rms_norm_forward_kernel(
    X,
    RESIDUAL,
    WEIGHT,
    Y,
    H,
    SCALE,
    n_rows,
    width,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Y, H (n_rows, width) contiguous, SCALE (n_rows,) = 1 / rms."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = (rows < n_rows)[:, None] & (columns < width)[None, :]
    WIDE: tl.constexpr = SCALE.dtype.element_ty
    h = tl.load(X + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(WIDE)
    weight = tl.load(WEIGHT + columns, mask=columns < width, other=0.0).to(WIDE)  # before the sum, which waits
    at = rows[:, None] * width + columns[None, :]
    if HAS_RESIDUAL:
        h += tl.load(RESIDUAL + rows[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0).to(WIDE)
        # backward sees the rounded stream: norm the rounded sum, not a better one that is then lost
        h = h.to(H.dtype.element_ty)
        tl.store(H + at, h, mask=mask)
        h = h.to(WIDE)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, 1) / width + eps)
    tl.store(SCALE + rows, scale, mask=rows < n_rows)
    tl.store(Y + at, (h * scale[:, None] * weight[None, :]).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    H,
    WEIGHT,
    SCALE,
    DY,
    DH,
    DX,
    PARTIAL,
    n_rows,
    width,
    h_stride,
    dy_stride,
    dh_stride,
    n_blocks,
    HAS_DH: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DX (n_rows, width) = through the norm + DH; PARTIAL (programs, width) = this program's rows' share of d_weight."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    WIDE: tl.constexpr = SCALE.dtype.element_ty
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(WIDE)
    total = tl.zeros([BLOCK], WIDE)
    for block in tl.range(tl.program_id(0), n_blocks, tl.num_programs(0), num_stages=STAGES):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < n_rows)[:, None] & inside[None, :]
        scale = tl.load(SCALE + rows, mask=rows < n_rows, other=0.0)[:, None]
        unit = tl.load(H + rows[:, None] * h_stride + columns[None, :], mask=mask, other=0.0).to(WIDE) * scale
        dy = tl.load(DY + rows[:, None] * dy_stride + columns[None, :], mask=mask, other=0.0).to(WIDE)
        if HAS_DH:
            dh = tl.load(DH + rows[:, None] * dh_stride + columns[None, :], mask=mask, other=0.0)
        if NEED_WEIGHT:
            total += tl.sum(dy * unit, 0)
        if NEED_X:
            inner = dy * weight[None, :]
            dx = scale * (inner - unit * (tl.sum(inner * unit, 1) / width)[:, None])
            if HAS_DH:
                dx += dh.to(WIDE)
            tl.store(DX + rows[:, None] * width + columns[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        tl.store(PARTIAL + tl.program_id(0).to(tl.int64) * width + columns, total, mask=inside)


@on_its_device
def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, scale) for x (N, H); h is empty without a residual."""
    x, weight = with_adjacent_columns(x), weight.contiguous()
    residual = None if residual is None else with_adjacent_columns(residual)
    n_rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    scale = x.new_empty(n_rows, dtype=wide_dtype(x.dtype))
    rows, block, warps = _tile(width)
    if n_rows:
        launch(
            rms_norm_forward_kernel,
            (cdiv(n_rows, rows),),
            x,
            x if residual is None else residual,
            weight,
            y,
            h,
            scale,
            n_rows,
            width,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )
    return y, h, scale


@on_its_device
def backward(
    h: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, dh: Tensor | None, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(d_x, d_weight); one that is not needed comes back empty."""
    h, dy, weight = with_adjacent_columns(h), with_adjacent_columns(dy), weight.contiguous()
    dh = None if dh is None else with_adjacent_columns(dh)
    n_rows, width = h.shape
    rows, block, warps = _tile(width)
    n_blocks = cdiv(n_rows, rows)
    programs = max(1, min(n_blocks, _programs(h)))
    d_x = torch.empty_like(h, memory_format=torch.contiguous_format) if need_x else h.new_empty(0)
    partial = scale.new_empty((programs, width)) if need_weight else scale
    launch(
        rms_norm_backward_kernel,
        (programs,),
        h,
        weight,
        scale,
        dy,
        dy if dh is None else dh,
        d_x,
        partial,
        n_rows,
        width,
        h.stride(0),
        dy.stride(0),
        0 if dh is None else dh.stride(0),
        n_blocks,
        HAS_DH=dh is not None,
        NEED_X=need_x,
        NEED_WEIGHT=need_weight,
        STAGES=_stages(rows * block * h.element_size() * (2 if dh is None else 3)),
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return d_x, partial.sum(0).to(weight.dtype) if need_weight else weight.new_empty(0)


def _tile(width: int) -> tuple[int, int, int]:
    """(rows per tile, columns rounded up to a power of two, warps)."""
    block = next_power_of_2(width)
    return max(1, min(32, TILE // block)), block, 4 if block <= 2048 else 8 if block <= 8192 else 16


def _stages(tile_bytes: int) -> int:
    """Stages of backward's loop, whose step reads tile_bytes: the tile in use and those in flight; 1: none is loaded ahead.

    With three stages at H=2048 and two programs per multiprocessor four tiles, 96 kB, are in flight while two are computed.
    """
    return max(1, min(3, 1 + SHARED_BYTES // tile_bytes))


def _programs(x: Tensor) -> int:
    """Programs of a persistent grid: two per multiprocessor; 3 in the interpreter, so that several rows meet in one."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
