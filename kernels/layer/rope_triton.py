"""Rotary positions in Triton, with QK-norm fused in where asked: contract and maths in rope.py.

A program holds ROWS positions of one head group: cos and sin are read once per group, every head's channels are read and
written once, and the next head is on its way while one is computed.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/layer/test_rope.py
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

# (positions x channels of a half) of one program: 16 x 64 at D=128, over 4 heads
TILE = 1024
HEADS = 4


@triton.jit
def _load_head(at, head, n_heads, head_stride, mask, HALF: tl.constexpr):
    """Both halves of a head's channels, 0 where there is no such head."""
    live = mask & (head < n_heads)
    at += head.to(tl.int64) * head_stride
    return tl.load(at, mask=live, other=0.0), tl.load(at + HALF, mask=live, other=0.0)


@triton.jit
def rope_kernel(
    X,
    Y,
    COS,
    SIN,
    WEIGHT,
    SCALE,
    n_positions,
    n_heads,
    x_stride,
    x_head_stride,
    cos_stride,
    eps,
    BACKWARD: tl.constexpr,
    NORM: tl.constexpr,
    DOUBLE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Y (T, heads, D) contiguous = X turned by +angle, by -angle when BACKWARD. NORM: X is RMS-normed per head before.

    With NORM forward also writes SCALE (T, heads) = 1 / rms.
    """
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    mask = (rows < n_positions)[:, None] & inside[None, :]
    angle = rows[:, None] * cos_stride + columns[None, :]
    cos = tl.load(COS + angle, mask=mask, other=0.0).to(WIDE)
    sin = tl.load(SIN + angle, mask=mask, other=0.0).to(WIDE)
    if BACKWARD:
        sin = -sin
    if NORM:
        weight_a = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(WIDE)[None, :]
        weight_b = tl.load(WEIGHT + HALF + columns, mask=inside, other=0.0).to(WIDE)[None, :]
    # one head ahead: a load that stands behind a store waits for it, because the compiler cannot know that they are apart
    first = tl.program_id(1) * HEADS
    a, b = _load_head(X + rows[:, None] * x_stride + columns[None, :], first, n_heads, x_head_stride, mask, HALF)
    for i in tl.static_range(HEADS):
        head = first + i
        if i + 1 < HEADS:
            x_at = X + rows[:, None] * x_stride + columns[None, :]
            next_a, next_b = _load_head(x_at, head + 1, n_heads, x_head_stride, mask, HALF)
        live = mask & (head < n_heads)
        a = a.to(WIDE)
        b = b.to(WIDE)
        if NORM:
            scale = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / (2 * HALF) + eps)
            tl.store(SCALE + rows[:, None] * n_heads + head, scale, mask=(rows < n_positions)[:, None] & (head < n_heads))
            a = a * scale * weight_a
            b = b * scale * weight_b
        y_at = Y + (rows[:, None] * n_heads + head) * (2 * HALF) + columns[None, :]
        tl.store(y_at, (a * cos - b * sin).to(Y.dtype.element_ty), mask=live)
        tl.store(y_at + HALF, (b * cos + a * sin).to(Y.dtype.element_ty), mask=live)
        if i + 1 < HEADS:
            a, b = next_a, next_b


@triton.jit
def rope_norm_backward_kernel(
    X,
    DY,
    DX,
    COS,
    SIN,
    WEIGHT,
    SCALE,
    PARTIAL,
    n_positions,
    n_heads,
    x_stride,
    x_head_stride,
    dy_stride,
    dy_head_stride,
    cos_stride,
    n_blocks,
    DOUBLE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DX (T, heads, D) of norm-then-turn; PARTIAL (programs, D) = this program's share of the norm weight's gradient."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    weight_a = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(WIDE)[None, :]
    weight_b = tl.load(WEIGHT + HALF + columns, mask=inside, other=0.0).to(WIDE)[None, :]
    total_a = tl.zeros([ROWS, BLOCK], WIDE)  # rows are added up at the end: a sum over warps is a barrier
    total_b = tl.zeros([ROWS, BLOCK], WIDE)
    n_groups = tl.cdiv(n_heads, HEADS)
    for block in tl.range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        rows = ((block // n_groups) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        first = (block % n_groups) * HEADS
        mask = (rows < n_positions)[:, None] & inside[None, :]
        dy_at = DY + rows[:, None] * dy_stride + columns[None, :]
        x_at = X + rows[:, None] * x_stride + columns[None, :]
        turned_a, turned_b = _load_head(dy_at, first, n_heads, dy_head_stride, mask, HALF)
        a, b = _load_head(x_at, first, n_heads, x_head_stride, mask, HALF)
        angle = rows[:, None] * cos_stride + columns[None, :]
        cos = tl.load(COS + angle, mask=mask, other=0.0).to(WIDE)
        sin = tl.load(SIN + angle, mask=mask, other=0.0).to(WIDE)
        for i in tl.static_range(HEADS):
            head = first + i
            if i + 1 < HEADS:  # one head ahead, as in rope_kernel
                next_turned_a, next_turned_b = _load_head(dy_at, head + 1, n_heads, dy_head_stride, mask, HALF)
                next_a, next_b = _load_head(x_at, head + 1, n_heads, x_head_stride, mask, HALF)
            dy_a = turned_a.to(WIDE) * cos + turned_b.to(WIDE) * sin
            dy_b = turned_b.to(WIDE) * cos - turned_a.to(WIDE) * sin
            real = (rows < n_positions)[:, None] & (head < n_heads)
            scale = tl.load(SCALE + rows[:, None] * n_heads + head, mask=real, other=0.0)
            unit_a = a.to(WIDE) * scale
            unit_b = b.to(WIDE) * scale
            total_a += dy_a * unit_a
            total_b += dy_b * unit_b
            inner_a = dy_a * weight_a
            inner_b = dy_b * weight_b
            mean = tl.sum(inner_a * unit_a + inner_b * unit_b, 1, keep_dims=True) / (2 * HALF)
            live = real & inside[None, :]
            dx_at = DX + (rows[:, None] * n_heads + head) * (2 * HALF) + columns[None, :]
            tl.store(dx_at, (scale * (inner_a - unit_a * mean)).to(DX.dtype.element_ty), mask=live)
            tl.store(dx_at + HALF, (scale * (inner_b - unit_b * mean)).to(DX.dtype.element_ty), mask=live)
            if i + 1 < HEADS:
                turned_a, turned_b, a, b = next_turned_a, next_turned_b, next_a, next_b
    out = PARTIAL + tl.program_id(0).to(tl.int64) * (2 * HALF) + columns
    tl.store(out, tl.sum(total_a, 0), mask=inside)
    tl.store(out + HALF, tl.sum(total_b, 0), mask=inside)


@on_its_device
def turn(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """(y (T, heads, D), scale (T, heads) or empty) of x (T, heads, D); cos, sin (T, >= D/2)."""
    x, (cos, sin) = with_adjacent_columns(x), _tables(cos, sin)
    n_positions, n_heads, width = x.shape
    y = x.new_empty(x.shape)
    wide = wide_dtype(x.dtype)
    scale = x.new_empty(0 if weight is None else (n_positions, n_heads), dtype=wide)
    block = next_power_of_2(width // 2)
    rows, heads = max(1, TILE // block), _group(n_heads)
    if x.numel():
        launch(
            rope_kernel,
            (cdiv(n_positions, rows), cdiv(n_heads, heads)),
            x,
            y,
            cos,
            sin,
            x if weight is None else weight.contiguous(),
            scale,
            n_positions,
            n_heads,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            eps,
            BACKWARD=backward,
            NORM=weight is not None,
            DOUBLE=wide is torch.float64,
            HALF=width // 2,
            HEADS=heads,
            ROWS=rows,
            BLOCK=block,
        )
    return y, scale


@on_its_device
def norm_backward(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(d_x, d_weight) of norm-then-turn."""
    x, dy, (cos, sin) = with_adjacent_columns(x), with_adjacent_columns(dy), _tables(cos, sin)
    n_positions, n_heads, width = x.shape
    block = next_power_of_2(width // 2)
    rows = max(1, TILE // block)
    heads = _group(n_heads)
    n_blocks = cdiv(n_positions, rows) * cdiv(n_heads, heads)
    # 3 programs per multiprocessor, what 130 registers admit; 3 in the interpreter, so that several blocks meet in one
    limit = 3 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    programs = max(1, min(n_blocks, limit))
    d_x, partial = x.new_empty(x.shape), scale.new_empty((programs, width))
    launch(
        rope_norm_backward_kernel,
        (programs,),
        x,
        dy,
        d_x,
        cos,
        sin,
        weight.contiguous(),
        scale,
        partial,
        n_positions,
        n_heads,
        x.stride(0),
        x.stride(1),
        dy.stride(0),
        dy.stride(1),
        cos.stride(0),
        n_blocks,
        DOUBLE=x.dtype is torch.float64,
        HALF=width // 2,
        HEADS=heads,
        ROWS=rows,
        BLOCK=block,
    )
    return d_x, partial.sum(0).to(weight.dtype)


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin with adjacent columns and one row stride."""
    cos, sin = with_adjacent_columns(cos), with_adjacent_columns(sin)
    return (cos, sin) if cos.stride(0) == sin.stride(0) else (cos.contiguous(), sin.contiguous())


def _group(n_heads: int) -> int:
    """Heads of one program, which share the angles it read: up to HEADS, without a remainder where that can be."""
    return next((group for group in range(HEADS, 1, -1) if n_heads % group == 0), min(HEADS, n_heads))
