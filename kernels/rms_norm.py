"""RMSNorm, optionally of a sum with the residual stream.

    h = x + residual;   y = weight * h / sqrt(mean(h**2) + eps)

Shapes: x (..., H), weight (H,). h and y have x's dtype; everything between is fp32 (fp64 for fp64) and rounded once.
Bench:  python -m chatmill.kernels.bench rms_norm
Source: Zhang & Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch", "reference"]


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., residual: None = ..., *, impl: Impl = ...) -> Tensor: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, impl: Impl = ...) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., *, residual: Tensor, impl: Impl = ...) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """y of the header; with a residual (y, h), h being the new residual stream."""
    _check(x, weight, residual)
    if impl == "reference":
        h = x if residual is None else x + residual
        y = rms_norm_reference(h, weight, eps)
    else:
        h = x if residual is None else x + residual
        y = _TorchNorm.apply(h, weight, eps)
    return y if residual is None else (y, h)


def rms_norm_reference(h: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula of the header in plain torch operations with autograd's gradients."""
    wide = h.to(_wide(h.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(h.dtype)


class _TorchNorm(torch.autograd.Function):
    """Saves h and one number per row; the normalised values are made again in backward."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        wide = h.to(_wide(h.dtype))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(h, weight, scale)
        return (wide * scale * weight.to(wide.dtype)).to(h.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[no-untyped-def]
        h, weight, scale = ctx.saved_tensors
        unit, grad = h.to(scale.dtype) * scale, grad.to(scale.dtype)
        d_h = d_weight = None
        if ctx.needs_input_grad[0]:
            inner = grad * weight.to(scale.dtype)
            d_h = (scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))).to(h.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = (grad * unit).reshape(-1, h.shape[-1]).sum(0).to(weight.dtype)
        return d_h, d_weight, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: expected x (..., H) and weight (H,); got {tuple(x.shape)} and {tuple(weight.shape)}.")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: expected a residual of shape {tuple(x.shape)}; got {tuple(residual.shape)}.")
