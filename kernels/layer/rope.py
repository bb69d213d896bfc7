"""Rotary positions for queries and keys, with per-head RMSNorm (QK-norm) before the rotation if weights are given.

    x <- weight * x / rms(x)                                    only with q_norm, k_norm
    (a, b) = the first and second half of a head's channels;   (a, b) -> (a cos - b sin, b cos + a sin)

Hugging Face's half-rotation layout (`rotate_half`): channel i turns with channel i + D/2.
Shapes: q (T, Hq, D), k (T, Hk, D), cos and sin (T, D/2), one angle per position and channel pair; norm weights (D,).
Computed in fp32 (fp64 for fp64) and rounded once. Backward turns the other way: without a norm only cos and sin are saved.
Bench:  python -m chatmill.kernels.bench rope
Source: Su et al., arXiv:2104.09864; QK-norm: Dehghani et al., arXiv:2302.05442.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import Impl, choose, why_no_triton
from ..eager import direct
from ..tensors import wide_dtype
from .rms_norm import rms_norm


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """q and k turned by their positions, in their own dtypes. No gradient flows into cos and sin.

    Tables of width D (both halves equal, as Hugging Face makes them) are accepted: their first half is read.
    """
    _check(q, k, cos, sin)
    return (
        rope_one(q, cos, sin, norm=q_norm, norm_eps=norm_eps, impl=impl),
        rope_one(k, cos, sin, norm=k_norm, norm_eps=norm_eps, impl=impl),
    )


def rope_one(
    x: Tensor, cos: Tensor, sin: Tensor, *, norm: Tensor | None = None, norm_eps: float = 1e-6, impl: Impl = "auto"
) -> Tensor:
    """`rope` of queries or of keys only, x (T, heads, D), for modules that own one norm each."""
    _check(x, x, cos, sin)
    half = x.shape[-1] // 2
    if cos.shape[-1] != half:
        cos, sin = cos[..., :half], sin[..., :half]
    chosen = choose("rope", impl, x.device, {"triton": why_no_triton(x.device), "torch": None, "reference": None})
    if chosen == "triton":
        turned: Tensor = _turned(x, cos, sin, norm, norm_eps)[0]
        return turned
    if norm is not None:
        x = rms_norm(x, norm, norm_eps, impl="reference" if chosen == "reference" else "torch")
    return _turn(x, cos, sin) if chosen == "reference" else _TorchTurn.apply(x, cos, sin)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of the header in plain torch operations with autograd's gradients."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


class _TorchTurn(torch.autograd.Function):
    """_turn without a tensor of its own for every product."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _turn_in_two_passes(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _turn_in_two_passes(grad, cos, -sin), None, None


def _turn_in_two_passes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler fuses the formula itself, and takes no views as `out`
        return _turn(x, cos, sin)
    wide = wide_dtype(x.dtype)
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]  # (T, 1, D/2)
    a, b = x.to(wide).chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=wide, device=x.device)
    first, second = out.chunk(2, dim=-1)
    torch.mul(a, c, out=first).addcmul_(b, s, value=-1)
    torch.mul(b, c, out=second).addcmul_(a, s)
    return out.to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = wide_dtype(x.dtype)
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]  # (T, 1, D/2)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)


@functools.cache
def _tier() -> ModuleType:
    """The Triton tier, imported when it is first called: an import statement costs 2 us each time."""
    from . import rope_triton

    return rope_triton


@torch.library.custom_op("chatmill::rope", mutates_args=())
def _rope_op(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(y (T, heads, D), scale (T, heads), empty without a norm)."""
    return _tier().turn(x, cos, sin, weight, eps)


@_rope_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(0 if weight is None else x.shape[:2], dtype=wide)


@torch.library.custom_op("chatmill::rope_backward", mutates_args=())
def _rope_backward_op(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _tier().turn(dy, cos, sin, None, 0.0, backward=True)[0]


@_rope_backward_op.register_fake
def _(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)


@torch.library.custom_op("chatmill::rope_norm_backward", mutates_args=())
def _rope_norm_backward_op(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, scale: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    return _tier().norm_backward(x, cos, sin, weight, scale, dy)


@_rope_norm_backward_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, cos, sin, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.has_norm = weight is not None
    ctx.save_for_backward(cos, sin, *((x, weight, output[1]) if ctx.has_norm else ()))


def _backward(ctx, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 5
    cos, sin, *norm = ctx.saved_tensors
    if not ctx.has_norm:
        return _turned_back(dy, cos, sin), None, None, None, None
    x, weight, scale = norm
    d_x, d_weight = _norm_gradients(x, cos, sin, weight, scale, dy)
    return d_x, None, None, d_weight, None


_rope_op.register_autograd(_backward, setup_context=_setup)
_turned = direct(_rope_op, _setup, _backward)
_turned_back = direct(_rope_backward_op)
_norm_gradients = direct(_rope_norm_backward_op)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[2] % 2:
        raise ValueError(
            f"rope: expected q (T, Hq, D) and k (T, Hk, D) with an even D; got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    allowed = [(q.shape[0], q.shape[2] // 2), (q.shape[0], q.shape[2])]
    if cos.shape != sin.shape or tuple(cos.shape) not in allowed:
        raise ValueError(f"rope: expected cos and sin of shape {allowed[0]}; got {tuple(cos.shape)} and {tuple(sin.shape)}.")
