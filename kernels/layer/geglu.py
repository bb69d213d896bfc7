"""GeGLU: gelu(gate) * up with gelu's tanh form, with a backward that saves nothing but its inputs.

    y = gelu(g) * u;   dg = dy * u * gelu'(g),  du = dy * gelu(g),  gelu(g) = g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))

Shapes: gate, up and y (..., F). Computed in fp32 (fp64 for fp64), rounded once. One tier, of torch's operations,
on every device: there is no Triton kernel of it.
Source: Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tensors import wide_dtype


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up in gate's dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"geglu: expected gate and up of one shape and dtype; got {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(up.shape)} {up.dtype}."
        )
    out: Tensor = _Geglu.apply(gate, up)
    return out


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula of the header in plain torch operations with autograd's gradients."""
    g = gate.to(wide_dtype(gate.dtype))
    inner = (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)
    return (0.5 * g * (1 + torch.tanh(inner)) * up.to(g.dtype)).to(gate.dtype)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        wide = wide_dtype(gate.dtype)
        return (F.gelu(gate.to(wide), approximate="tanh") * up).to(gate.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        wide = wide_dtype(gate.dtype)
        g, dy = gate.to(wide), grad.to(wide)
        d_gate = torch.ops.aten.gelu_backward(dy * up, g, approximate="tanh")
        return d_gate.to(gate.dtype), (F.gelu(g, approximate="tanh") * dy).to(up.dtype)
