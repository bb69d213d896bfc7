"""SwiGLU in Triton: contract and maths in swiglu.py. Backward makes the sigmoid again: nothing but the inputs is saved.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/layer/test_swiglu.py
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
from ..tensors import cdiv, next_power_of_2, with_adjacent_columns

# elements of one program
TILE = 2048


@triton.jit
def swiglu_forward_kernel(
    GATE, UP, Y, n_rows, width, gate_stride, up_stride, DOUBLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Y (N, F) contiguous = silu(GATE) * UP; one program: BLOCK columns of ROWS rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < n_rows) & (columns < width)
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    gate = tl.load(GATE + row * gate_stride + columns, mask=mask, other=0.0).to(WIDE)
    up = tl.load(UP + row * up_stride + columns, mask=mask, other=0.0).to(WIDE)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    GATE,
    UP,
    DY,
    DGATE,
    DUP,
    n_rows,
    width,
    gate_stride,
    up_stride,
    dy_stride,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DGATE, DUP (N, F) contiguous."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < n_rows) & (columns < width)
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    gate = tl.load(GATE + row * gate_stride + columns, mask=mask, other=0.0).to(WIDE)
    up = tl.load(UP + row * up_stride + columns, mask=mask, other=0.0).to(WIDE)
    dy = tl.load(DY + row * dy_stride + columns, mask=mask, other=0.0).to(WIDE)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    at = row * width + columns
    tl.store(DGATE + at, (dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(DGATE.dtype.element_ty), mask=mask)
    tl.store(DUP + at, (dy * gate * sigmoid).to(DUP.dtype.element_ty), mask=mask)


@on_its_device
def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for (N, F)."""
    gate, up = with_adjacent_columns(gate), with_adjacent_columns(up)
    y = gate.new_empty(gate.shape)
    rows, block = tile(gate.shape[1])
    if y.numel():
        launch(
            swiglu_forward_kernel,
            (cdiv(gate.shape[0], rows), cdiv(gate.shape[1], block)),
            gate,
            up,
            y,
            *gate.shape,
            gate.stride(0),
            up.stride(0),
            DOUBLE=gate.dtype is torch.float64,
            ROWS=rows,
            BLOCK=block,
        )
    return y


@on_its_device
def backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(d_gate, d_up) for (N, F)."""
    gate, up, dy = with_adjacent_columns(gate), with_adjacent_columns(up), with_adjacent_columns(dy)
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    rows, block = tile(gate.shape[1])
    if gate.numel():
        launch(
            swiglu_backward_kernel,
            (cdiv(gate.shape[0], rows), cdiv(gate.shape[1], block)),
            gate,
            up,
            dy,
            d_gate,
            d_up,
            *gate.shape,
            gate.stride(0),
            up.stride(0),
            dy.stride(0),
            DOUBLE=gate.dtype is torch.float64,
            ROWS=rows,
            BLOCK=block,
        )
    return d_gate, d_up


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) of one program."""
    block = min(TILE, next_power_of_2(width))
    return TILE // block, block
