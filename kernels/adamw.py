"""AdamW over many tensors at once with clipping by their global norm; no gradient is rewritten and the host never waits.

    norm = sqrt(sum g^2);   g' = g * min(1, max_norm / (norm + 1e-6));   nothing at all changes where norm is inf or nan
    w -= lr * decay * w;    m = b1 m + (1 - b1) g';   v = b2 v + (1 - b2) g'^2;   w -= lr m^ / (sqrt(v^) + eps)

fp32 weights, gradients and moments; on request a bf16 copy of the weights is written in the same pass.
Bytes that go through memory per parameter (BYTES): torch's clip_grad_norm_ reads the gradient (4), then reads and writes it
(8), and its fused AdamW reads four tensors and writes three (28), together 40. Handed the clip coefficient as `grad_scale`,
torch's kernel writes the gradient back: 36. Here: 4 + 28 = 32. A bf16 copy costs 2 instead of 6.
Not used by the trainer: it has not been timed. `chatmill bench kernels adamw` on a GPU decides.
Bench:  python -m chatmill.kernels.bench adamw
Source: Loshchilov & Hutter, arXiv:1711.05101; clipping as torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from chatmill.kernels.dispatch import choose, why_no_triton

Impl = Literal["triton", "reference"]
BYTES = {"triton": 32.0, "torch clip + fused": 40.0, "torch fused, scaled": 36.0}


def adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    weight_decays: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    max_norm: float | None = None,
    squared_norm: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    impl: Impl = "triton",
) -> Tensor:
    """One update in place; returns the norm before clipping, Float32[""], on the device.

    weights, gradients, means, squares: fp32, contiguous, alike in shape. step: Float32[""], updates made so far; counts this
    one unless it is skipped. weight_decays: one per tensor. copies: bf16, become the new weights (the old where skipped).
    squared_norm: of all gradients where these are a part (`squared_norm_of` summed over ranks or groups).
    """
    _check(weights, gradients, means, squares, weight_decays, copies)
    obstacles = {"triton": why_no_triton(step.device), "reference": None}
    engine = choose("adamw", impl, step.device, obstacles)
    total = squared_norm_of(gradients, impl=impl) if squared_norm is None else squared_norm
    norm = total.sqrt()
    updates = torch.isfinite(norm)
    clip = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    step += updates
    # in fp64, as torch's fused step: 1 - 0.999**t in fp32 is off by 1e-4 at t = 1
    count = step.double()
    rate, root = lr / (1 - betas[0] ** count), torch.rsqrt(1 - betas[1] ** count)
    if engine == "triton":
        from chatmill.kernels import adamw_triton

        scalars = torch.stack((clip.double(), updates.double(), rate, root)).float()
        tensors = (weights, gradients, means, squares, copies or weights)
        adamw_triton.update(tensors, scalars, [lr * d for d in weight_decays], betas, eps, copies is not None)
        return norm
    if bool(updates):
        for w, g, m, v, decay in zip(weights, gradients, means, squares, weight_decays, strict=True):
            clipped = g * clip
            w.mul_(1 - lr * decay)
            m.lerp_(clipped, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(clipped, clipped, value=1 - betas[1])
            w.sub_(rate.float() * m / (v.sqrt() * root.float() + eps))
    for w, copy in zip(weights, copies or (), strict=False):
        copy.copy_(w)
    return norm


def squared_norm_of(gradients: Sequence[Tensor], *, impl: Impl = "triton") -> Tensor:
    """Sum of all squares, Float32[""], in a fixed order: repeatable to the bit."""
    if impl == "triton" and gradients and why_no_triton(gradients[0].device) is None:
        from chatmill.kernels import adamw_triton

        return adamw_triton.squared_norm(gradients)
    return torch.stack([g.double().square().sum() for g in gradients]).sum().float()


def _check(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    weight_decays: Sequence[float],
    copies: Sequence[Tensor] | None,
) -> None:
    lists = [weights, gradients, means, squares, *([] if copies is None else [copies])]
    if not weights or {len(tensors) for tensors in lists} != {len(weight_decays)}:
        raise ValueError(f"adamw_: expected lists of one length; got {[len(t) for t in lists]}, {len(weight_decays)} decays.")
    for i, w in enumerate(weights):
        for tensors, dtype in zip(lists, (torch.float32,) * 4 + (torch.bfloat16,), strict=False):
            t = tensors[i]
            if t.dtype is not dtype or t.shape != w.shape or not t.is_contiguous():
                raise ValueError(
                    f"adamw_: tensor {i}: expected contiguous {dtype} of shape {tuple(w.shape)}; "
                    f"got {t.dtype} {tuple(t.shape)}, strides {t.stride()}."
                )
