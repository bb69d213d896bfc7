"""Triton engine of the rotary positions, with QK-norm fused in where asked: contract and maths in rope.py.

A program holds ROWS positions of one head group: cos and sin are read once per
group, every head's channels are read and written once.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/test_rope.py
        python -m chatmill.kernels.cross_compile chatmill.kernels.rope_triton
"""

# mypy: disable-error-code="no-untyped-def"
# (triton.jit functions have no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chatmill.kernels.cross_compile import Case
from chatmill.kernels.interpreter import install, is_interpreting

# (positions x channels of a half) of one program: 16 x 64 at D=128, over 4 heads
TILE = 1024
HEADS = 4


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
    half,
    x_stride,
    x_head_stride,
    cos_stride,
    eps,
    BACKWARD: tl.constexpr,
    NORM: tl.constexpr,
    DOUBLE: tl.constexpr,
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
    inside = columns < half
    mask = (rows < n_positions)[:, None] & inside[None, :]
    angle = rows[:, None] * cos_stride + columns[None, :]
    cos = tl.load(COS + angle, mask=mask, other=0.0).to(WIDE)
    sin = tl.load(SIN + angle, mask=mask, other=0.0).to(WIDE)
    if BACKWARD:
        sin = -sin
    if NORM:
        weight_a = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(WIDE)[None, :]
        weight_b = tl.load(WEIGHT + half + columns, mask=inside, other=0.0).to(WIDE)[None, :]
    for i in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + i
        live = mask & (head < n_heads)
        x_at = X + rows[:, None] * x_stride + head * x_head_stride + columns[None, :]
        a = tl.load(x_at, mask=live, other=0.0).to(WIDE)
        b = tl.load(x_at + half, mask=live, other=0.0).to(WIDE)
        if NORM:
            scale = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)
            tl.store(SCALE + rows * n_heads + head, scale, mask=(rows < n_positions) & (head < n_heads))
            a = a * scale[:, None] * weight_a
            b = b * scale[:, None] * weight_b
        y_at = Y + (rows[:, None] * n_heads + head) * (2 * half) + columns[None, :]
        tl.store(y_at, (a * cos - b * sin).to(Y.dtype.element_ty), mask=live)
        tl.store(y_at + half, (b * cos + a * sin).to(Y.dtype.element_ty), mask=live)


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
    half,
    x_stride,
    x_head_stride,
    dy_stride,
    dy_head_stride,
    cos_stride,
    n_blocks,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DX (T, heads, D) of norm-then-turn; PARTIAL (programs, D) = this program's share of the norm weight's gradient."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    weight_a = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(WIDE)[None, :]
    weight_b = tl.load(WEIGHT + half + columns, mask=inside, other=0.0).to(WIDE)[None, :]
    total_a = tl.zeros([BLOCK], WIDE)
    total_b = tl.zeros([BLOCK], WIDE)
    for block in tl.range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        rows = ((block // n_heads) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        head = block % n_heads
        mask = (rows < n_positions)[:, None] & inside[None, :]
        angle = rows[:, None] * cos_stride + columns[None, :]
        cos = tl.load(COS + angle, mask=mask, other=0.0).to(WIDE)
        sin = tl.load(SIN + angle, mask=mask, other=0.0).to(WIDE)
        dy_at = DY + rows[:, None] * dy_stride + head * dy_head_stride + columns[None, :]
        turned_a = tl.load(dy_at, mask=mask, other=0.0).to(WIDE)
        turned_b = tl.load(dy_at + half, mask=mask, other=0.0).to(WIDE)
        dy_a = turned_a * cos + turned_b * sin
        dy_b = turned_b * cos - turned_a * sin
        scale = tl.load(SCALE + rows * n_heads + head, mask=rows < n_positions, other=0.0)[:, None]
        x_at = X + rows[:, None] * x_stride + head * x_head_stride + columns[None, :]
        unit_a = tl.load(x_at, mask=mask, other=0.0).to(WIDE) * scale
        unit_b = tl.load(x_at + half, mask=mask, other=0.0).to(WIDE) * scale
        total_a += tl.sum(dy_a * unit_a, 0)
        total_b += tl.sum(dy_b * unit_b, 0)
        inner_a = dy_a * weight_a
        inner_b = dy_b * weight_b
        mean = ((tl.sum(inner_a * unit_a, 1) + tl.sum(inner_b * unit_b, 1)) / (2 * half))[:, None]
        dx_at = DX + (rows[:, None] * n_heads + head) * (2 * half) + columns[None, :]
        tl.store(dx_at, (scale * (inner_a - unit_a * mean)).to(DX.dtype.element_ty), mask=mask)
        tl.store(dx_at + half, (scale * (inner_b - unit_b * mean)).to(DX.dtype.element_ty), mask=mask)
    out = PARTIAL + tl.program_id(0).to(tl.int64) * (2 * half) + columns
    tl.store(out, total_a, mask=inside)
    tl.store(out + half, total_b, mask=inside)


def turn(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """(y (T, heads, D), scale (T, heads) or empty) of x (T, heads, D); cos, sin (T, >= D/2)."""
    x, cos, sin = _prepare(x), _prepare(cos), _prepare(sin)
    if cos.stride(0) != sin.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    n_positions, n_heads, width = x.shape
    y = x.new_empty(x.shape)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    scale = x.new_empty(0 if weight is None else (n_positions, n_heads), dtype=wide)
    block = triton.next_power_of_2(width // 2)
    rows = max(1, TILE // block)
    if x.numel():
        rope_kernel[(triton.cdiv(n_positions, rows), triton.cdiv(n_heads, HEADS))](
            x,
            y,
            cos,
            sin,
            x if weight is None else weight.contiguous(),
            scale,
            n_positions,
            n_heads,
            width // 2,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            eps,
            BACKWARD=backward,
            NORM=weight is not None,
            DOUBLE=wide is torch.float64,
            HEADS=HEADS,
            ROWS=rows,
            BLOCK=block,
        )
    return y, scale


def norm_backward(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(d_x, d_weight) of norm-then-turn."""
    x, dy, cos, sin = _prepare(x), _prepare(dy), _prepare(cos), _prepare(sin)
    if cos.stride(0) != sin.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    n_positions, n_heads, width = x.shape
    block = triton.next_power_of_2(width // 2)
    rows = max(1, TILE // block)
    n_blocks = triton.cdiv(n_positions, rows) * n_heads
    # 4 programs per multiprocessor; 3 in the interpreter, so that several blocks meet in one
    limit = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    programs = max(1, min(n_blocks, limit))
    d_x, partial = x.new_empty(x.shape), scale.new_empty((programs, width))
    rope_norm_backward_kernel[(programs,)](
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
        width // 2,
        x.stride(0),
        x.stride(1),
        dy.stride(0),
        dy.stride(1),
        cos.stride(0),
        n_blocks,
        DOUBLE=x.dtype is torch.float64,
        ROWS=rows,
        BLOCK=block,
    )
    return d_x, partial.sum(0).to(weight.dtype)


def _prepare(x: Tensor) -> Tensor:
    """x with adjacent channels; position and head strides are free."""
    if is_interpreting():
        install()
    return x if x.stride(-1) == 1 else x.contiguous()


def shipped_cases() -> list[Case]:
    """The configurations that ship, for the cross-compilation gates."""
    from chatmill.kernels.layer_cases import rope_cases

    return rope_cases()
