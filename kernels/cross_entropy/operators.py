"""The torch operators of the linear cross-entropy, their autograd, and how rows are gathered and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors import wide_dtype
from .rows import LossOptions, VocabularyShard, weighted
from .torch_tier import run_torch

# elements of a gradient that are scaled at once on a CPU
SCALED_ELEMENTS = 1 << 22


class GatherRows(torch.autograd.Function):
    """hidden[rows] with zero rows where not valid; backward writes each row once (no atomics, so it is deterministic)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, rows: Tensor, valid: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows)
        ctx.n_tokens = hidden.shape[0]
        return hidden.index_select(0, rows.clamp(min=0)).masked_fill_(~valid[:, None], 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        return spread(grad, rows, ctx.n_tokens), None, None


def spread(values: Tensor, rows: Tensor | None, n_tokens: int) -> Tensor:
    """values (R, ...) at their token positions in zeros (n_tokens, ...); padding lands in one extra row, cut off."""
    if rows is None:
        return values
    out = values.new_zeros((n_tokens + 1, *values.shape[1:]))
    return out.index_copy(0, torch.where(rows >= 0, rows, n_tokens).to(torch.int64), values)[:n_tokens]


def _run(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor | None,
    options: LossOptions,
    impl: str,
    needs: tuple[bool, bool],
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses, lse, hits, d_x, d_weight); without coefficients only the loss, the gradients are then empty."""
    if impl == "triton":
        from .triton_tier import run_triton as run
    else:
        run = run_torch
    with torch.autocast(x.device.type, enabled=False):
        return run(x, weight, labels, coefficients, options, needs, shard)


@torch.library.custom_op("chatmill::linear_cross_entropy_sum", mutates_args=())
def sum_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    products: str,
    impl: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum of coefficient x loss, losses (R,), lse (R,), hits (R,), d_x, d_weight); gradients empty unless needed."""
    options, needs = LossOptions(label_smoothing, z_loss, softcap, products), (need_x, need_weight)
    losses, lse, hits, d_x, d_weight = _run(x, weight, labels, coefficients, options, impl, needs)
    return weighted(losses, coefficients).sum(), losses, lse, hits, d_x, d_weight


@sum_op.register_fake
def _(x: Tensor, weight: Tensor, labels: Tensor, coefficients: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, need_x, need_weight = options
    losses = torch.empty_like(coefficients)
    d_x = x.new_empty(x.shape if need_x else (0,))
    d_weight = weight.new_empty(weight.shape if need_weight else (0,))
    hits = torch.empty_like(coefficients, dtype=torch.bool)
    return coefficients.new_empty(()), losses, torch.empty_like(losses), hits, d_x, d_weight


def _sum_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[4], output[5])


def _sum_backward(ctx, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    d_x, d_weight = ctx.saved_tensors
    found = [None if grad is None or not ctx.needs_input_grad[i] else _scaled(d, grad) for i, d in enumerate((d_x, d_weight))]
    return (*found, *(None,) * 9)


sum_op.register_autograd(_sum_backward, setup_context=_sum_setup)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient x factor in fp32 and rounded once; never in place, so that backward can run again."""
    # reading the factor is free on a CPU, a host sync on a GPU, and impossible while tracing (then it is a subclass)
    is_plain = type(factor) is Tensor and factor.device.type == "cpu"
    if is_plain and float(factor) == 1.0:
        return gradient
    if gradient.dtype in (torch.float32, torch.float64):
        return gradient * factor
    factor = factor.reshape((1,) * gradient.dim())
    if not is_plain or gradient.dim() == 1:
        # one pass: neither a GPU nor a compiler makes the wide product a tensor of its own
        return torch.mul(gradient, factor, out=torch.empty_like(gradient))
    out = torch.empty_like(gradient)
    step = max(1, SCALED_ELEMENTS // max(1, gradient.shape[1]))
    for start in range(0, gradient.shape[0], step):  # a CPU does
        out[start : start + step] = gradient[start : start + step] * factor
    return out


@torch.library.custom_op("chatmill::linear_cross_entropy_rows", mutates_args=())
def rows_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    products: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (R,), lse (R,), hits (R,)); differentiable in losses by projecting again in backward."""
    options = LossOptions(label_smoothing, z_loss, softcap, products)
    return _run(x, weight, labels, None, options, impl, (False, False))[:3]


@rows_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype))
    return losses, torch.empty_like(losses), torch.empty_like(losses, dtype=torch.bool)


def _rows_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _rows_backward(ctx, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 8
    x, weight, labels = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    *_, d_x, d_weight = sum_op(x, weight, labels, grad.contiguous(), *ctx.options, *needs)
    return (d_x if needs[0] else None, d_weight if needs[1] else None, *(None,) * 6)


rows_op.register_autograd(_rows_backward, setup_context=_rows_setup)


class ShardedLoss(torch.autograd.Function):
    """The two operators above for a head split over ranks. A process group is no operator argument, hence a Function."""

    @staticmethod
    def forward(ctx, x, weight, labels, coefficients, options, impl, shard):  # type: ignore[no-untyped-def]
        ctx.options, ctx.impl, ctx.shard, ctx.summed = options, impl, shard, coefficients is not None
        needs = ctx.needs_input_grad[:2] if ctx.summed else (False, False)
        losses, lse, hits, *gradients = _run(x, weight, labels, coefficients, options, impl, needs, shard)
        ctx.save_for_backward(*(gradients if ctx.summed else (x, weight, labels)))
        ctx.mark_non_differentiable(lse, hits)
        if coefficients is None:
            return losses, losses.detach().clone(), lse, hits
        return weighted(losses, coefficients).sum(), losses, lse, hits

    @staticmethod
    def backward(ctx, grad, *unused):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad[:2]
        if ctx.summed:
            found = [_scaled(d, grad) if need else None for d, need in zip(ctx.saved_tensors, needs, strict=True)]
        else:
            x, weight, labels = ctx.saved_tensors
            *_, d_x, d_weight = _run(x, weight, labels, grad.contiguous(), ctx.options, ctx.impl, needs, ctx.shard)
            found = [d if need else None for d, need in zip((d_x, d_weight), needs, strict=True)]
        return (*found, *(None,) * 5)
