"""RMSNorm, optionally of a sum with the residual stream.

    h = x + residual;   y = weight * h / sqrt(mean(h**2) + eps)

Shapes: x (..., H), weight (H,). h and y have x's dtype; everything between is fp32 (fp64 for fp64) and rounded once.
Bench:  python -m chatmill.kernels.bench rms_norm
Source: Zhang & Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from ..dispatch import Impl, choose, why_no_triton
from ..eager import direct
from ..tensors import wide_dtype

# the Triton kernels hold whole rows in registers
MAX_WIDTH = 32768


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
    wide = f"a row of {x.shape[-1]} values does not fit one tile" if x.shape[-1] > MAX_WIDTH else None
    obstacles = {"triton": why_no_triton(x.device) or wide, "torch": None, "reference": None}
    chosen = choose("rms_norm", impl, x.device, obstacles)
    if chosen == "triton":
        flat = None if residual is None else residual.to(x.dtype).reshape(-1, x.shape[-1])
        y, h, _ = _norm(x.reshape(-1, x.shape[-1]), weight, flat, eps)
        return y.view(x.shape) if residual is None else (y.view(x.shape), h.view(x.shape))
    h = x if residual is None else x + residual.to(x.dtype)
    y = rms_norm_reference(h, weight, eps) if chosen == "reference" else _TorchNorm.apply(h, weight, eps)
    return y if residual is None else (y, h)


def rms_norm_reference(h: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula of the header in plain torch operations with autograd's gradients."""
    wide = h.to(wide_dtype(h.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(h.dtype)


class _TorchNorm(torch.autograd.Function):
    """Saves h and one number per row; the normalised values are recomputed in backward."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        wide = h.to(wide_dtype(h.dtype))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(h, weight, scale)
        return (wide * scale).mul_(weight.to(wide.dtype)).to(h.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[no-untyped-def]
        """With u = scale h and g = grad u: d_weight = sum of g;  d_h = scale (grad weight - u mean(g weight))."""
        h, weight, scale = ctx.saved_tensors
        unit, grad = h.to(scale.dtype) * scale, grad.to(scale.dtype)
        product = grad * unit
        d_h = d_weight = None
        if ctx.needs_input_grad[0]:
            wide = weight.to(scale.dtype)
            mean = (product @ wide).unsqueeze(-1).div_(h.shape[-1])
            d_h = torch.mul(grad, wide).addcmul_(unit, mean, value=-1).mul_(scale).to(h.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = product.reshape(-1, h.shape[-1]).sum(0).to(weight.dtype)
        return d_h, d_weight, None


@functools.cache
def _tier() -> ModuleType:
    """The Triton tier, imported when it is first called: an import statement costs 2 us each time."""
    from . import rms_norm_triton

    return rms_norm_triton


@torch.library.custom_op("chatmill::rms_norm", mutates_args=())
def _norm_op(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y (N, H), h (N, H) or empty, scale (N,))."""
    return _tier().forward(x, weight, residual, eps)


@_norm_op.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, x.new_empty(0) if residual is None else torch.empty_like(y), x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype))


@torch.library.custom_op("chatmill::rms_norm_backward", mutates_args=())
def _norm_backward_op(
    h: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, dh: Tensor | None, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return _tier().backward(h, weight, scale, dy, dh, need_x, need_weight)


@_norm_backward_op.register_fake
def _(
    h: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, dh: Tensor | None, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape if need_x else (0,)), weight.new_empty(weight.shape if need_weight else (0,))


def _norm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, residual, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight, output[2])


def _norm_backward(ctx, dy: Tensor | None, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    h, weight, scale = ctx.saved_tensors
    stream = dh if ctx.has_residual else None
    if dy is None:  # only the residual stream was used further on
        return stream, None, stream, None
    need_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
    d_x, d_weight = _norm_gradients(h, weight, scale, dy, stream, need_x, ctx.needs_input_grad[1])
    through = d_x if need_x else None
    return through, d_weight if ctx.needs_input_grad[1] else None, through if ctx.has_residual else None, None


_norm_op.register_autograd(_norm_backward, setup_context=_norm_setup)
_norm = direct(_norm_op, _norm_setup, _norm_backward)
_norm_gradients = direct(_norm_backward_op)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: expected x (..., H) and weight (H,); got {tuple(x.shape)} and {tuple(weight.shape)}.")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: expected a residual of shape {tuple(x.shape)}; got {tuple(residual.shape)}.")
