"""SwiGLU: silu(gate) * up, with a backward that saves nothing but its inputs.

    y = g * s * u;   dg = dy * u * s * (1 + g * (1 - s)),  du = dy * g * s,  s = sigmoid(g)

Shapes: gate, up and y (..., F). Computed in fp32 (fp64 for fp64), rounded once.
Bench:  python -m chatmill.kernels.bench swiglu
Source: Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import Impl, choose, why_no_triton
from ..eager import direct
from ..tensors import wide_dtype


def swiglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(gate) * up in gate's dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: expected gate and up of one shape and dtype; got {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(up.shape)} {up.dtype}."
        )
    chosen = choose("swiglu", impl, gate.device, {"triton": why_no_triton(gate.device), "torch": None, "reference": None})
    if chosen == "reference":
        return swiglu_reference(gate, up)
    if chosen == "triton":
        width = gate.shape[-1]
        y: Tensor = _swiglu(gate.reshape(-1, width), up.reshape(-1, width))
        return y.view(gate.shape)
    return _TorchSwiglu.apply(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula of the header in plain torch operations with autograd's gradients."""
    g = gate.to(wide_dtype(gate.dtype))
    return (g * torch.sigmoid(g) * up.to(g.dtype)).to(gate.dtype)


class _TorchSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        wide = wide_dtype(gate.dtype)
        return F.silu(gate.to(wide)).mul_(up).to(gate.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        wide = wide_dtype(gate.dtype)
        g, dy = gate.to(wide), grad.to(wide)
        s = torch.sigmoid(g)  # once: the exponential costs as much as six of the other passes on a CPU
        y = g * s
        slope = torch.lerp(y, y.new_ones(()), s)  # y + s (1 - y) = s (1 + g (1 - s))
        return slope.mul_(dy * up).to(gate.dtype), y.mul_(dy).to(up.dtype)


@functools.cache
def _tier() -> ModuleType:
    """The Triton tier, imported when it is first called: an import statement costs 2 us each time."""
    from . import swiglu_triton

    return swiglu_triton


@torch.library.custom_op("chatmill::swiglu", mutates_args=())
def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    return _tier().forward(gate, up)


@_swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("chatmill::swiglu_backward", mutates_args=())
def _swiglu_backward_op(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _tier().backward(gate, up, dy)


@_swiglu_backward_op.register_fake
def _(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> Any:  # type: ignore[no-untyped-def]
    return _gradients(*ctx.saved_tensors, dy)


_swiglu_op.register_autograd(_backward, setup_context=_setup)
_swiglu = direct(_swiglu_op, _setup, _backward)
_gradients = direct(_swiglu_backward_op)
