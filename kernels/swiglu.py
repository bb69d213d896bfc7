"""SwiGLU: silu(gate) * up, with a backward that saves nothing but its inputs.

    y = g * sigmoid(g) * u;   dg = dy * u * s * (1 + g * (1 - s)),  du = dy * g * s,  s = sigmoid(g)

Shapes: gate, up and y (..., F). Computed in fp32 (fp64 for fp64), rounded once.
Bench:  python -m chatmill.kernels.bench swiglu
Source: Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Impl = Literal["auto", "triton", "torch", "reference"]


def swiglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(gate) * up in gate's dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: expected gate and up of one shape and dtype; got {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(up.shape)} {up.dtype}."
        )
    if impl == "reference":
        return swiglu_reference(gate, up)
    return _TorchSwiglu.apply(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula of the header in plain torch operations with autograd's gradients."""
    wide = torch.float64 if gate.dtype is torch.float64 else torch.float32
    g = gate.to(wide)
    return (g * torch.sigmoid(g) * up.to(wide)).to(gate.dtype)


class _TorchSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad
