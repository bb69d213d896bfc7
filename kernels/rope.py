"""Rotary positions for queries and keys.

    (a, b) = the first and second half of a head's channels;   (a, b) -> (a cos - b sin, b cos + a sin)

Hugging Face's half-rotation layout (`rotate_half`): channel i turns with channel i + D/2.
Shapes: q (T, Hq, D), k (T, Hk, D), cos and sin (T, D/2), one angle per position and channel pair.
The turn is computed in fp32 (fp64 for fp64) and rounded once; backward turns the other way, nothing but cos and sin is saved.
Bench:  python -m chatmill.kernels.bench rope
Source: Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch", "reference"]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """q and k turned by their positions, in their own dtypes. No gradient flows into cos and sin.

    Tables of width D (both halves equal, as Hugging Face makes them) are accepted: their first half is read.
    """
    _check(q, k, cos, sin)
    half = q.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if impl == "reference":
        return rope_reference(q, k, cos, sin)
    return _TorchTurn.apply(q, cos, sin), _TorchTurn.apply(k, cos, sin)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of the header in plain torch operations with autograd's gradients."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


class _TorchTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]  # (T, 1, D/2)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[2] % 2:
        raise ValueError(
            f"rope: expected q (T, Hq, D) and k (T, Hk, D) with an even D; got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    allowed = [(q.shape[0], q.shape[2] // 2), (q.shape[0], q.shape[2])]
    if cos.shape != sin.shape or tuple(cos.shape) not in allowed:
        raise ValueError(f"rope: expected cos and sin of shape {allowed[0]}; got {tuple(cos.shape)} and {tuple(sin.shape)}.")
