"""Cross-entropy of given logits, with every option of the linear form; on request in place.

    contract and maths: interface.py, with z = softcap(logits)

Use linear_cross_entropy where you can: it never makes the logits. With inplace=True the logits' memory becomes their own
gradient in the forward pass, so no second (N, V) tensor exists. The logits are then gone, and autograd refuses a graph in
which another operation still needs them.
Shapes: N tokens, V vocabulary. Losses and softmax in fp32 (fp64 for fp64), the gradient has the logits' dtype.
Bench:  python -m chatmill.kernels.bench cross_entropy
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..dispatch import choose, why_no_triton
from ..tensors import wide_dtype, with_adjacent_columns
from .rows import (
    LossMetrics,
    LossOptions,
    Reduction,
    VocabularyShard,
    check_options,
    finish_rows,
    known_labels,
    row_coefficients,
    weighted,
)
from .torch_tier import CHUNK_BYTES, consume_logits

Impl = Literal["auto", "triton", "torch"]


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, LossMetrics]:
    """(loss, metrics) of logits (N, V) and targets Int (N,); options as in linear_cross_entropy.

    inplace (not with reduction "none", whose row gradients are known only in backward): see the header. A second backward
    through the same loss is refused then. shard: logits are this rank's columns of a split vocabulary (rows.py).
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"cross_entropy: expected logits (N, V) and targets (N,); got {logits.shape} and {targets.shape}.")
    if inplace and reduction == "none":
        raise ValueError("cross_entropy: inplace=True needs reduction 'sum' or 'mean'. Set inplace=False.")
    check_options("cross_entropy", targets, token_weights, label_smoothing, softcap, reduction, normalizer)
    chosen = choose("linear_cross_entropy", impl, logits.device, {"triton": why_no_triton(logits.device), "torch": None})
    valid = targets != ignore_index
    labels = known_labels(targets, valid, logits.shape[1] if shard is None else shard.vocabulary)
    coefficients, count = row_coefficients(valid, token_weights, reduction, normalizer, wide_dtype(logits.dtype))
    if shard is not None:
        labels = shard.local(labels, logits.shape[1])
    how = (LossOptions(label_smoothing, z_loss, softcap or 0.0), chosen, shard)
    if reduction == "none":
        losses, lse, hits = _RowLosses.apply(logits, labels, how)
        loss = weighted(losses, coefficients)
    else:
        loss, losses, lse, hits = _SummedLoss.apply(logits, labels, coefficients, inplace, how)
    lse, losses = (torch.where(valid, t.detach(), 0.0) for t in (lse, losses))
    return loss, LossMetrics(lse, (hits & valid).sum(), count, losses)


How = tuple[LossOptions, str, VocabularyShard | None]


class _SummedLoss(torch.autograd.Function):
    """sum of coefficient x loss; its gradient is ready when forward ends."""

    @staticmethod
    def forward(ctx, logits, labels, coefficients, inplace, how):  # type: ignore[no-untyped-def]
        out = None
        if ctx.needs_input_grad[0]:
            out = logits.detach() if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        losses, lse, hits = _run(logits.detach(), labels, coefficients, out, how)
        ctx.gradient, ctx.inplace = out, inplace
        if inplace and out is not None:
            torch.autograd.graph.increment_version(logits)
        ctx.mark_non_differentiable(losses, lse, hits)
        return weighted(losses, coefficients).sum(), losses, lse, hits

    @staticmethod
    def backward(ctx, grad, *unused):  # type: ignore[no-untyped-def]
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError("cross_entropy: the in-place gradient was used up by an earlier backward. Set inplace=False.")
        if ctx.inplace:
            ctx.gradient = None
        out = gradient if ctx.inplace else torch.empty_like(gradient)
        size = max(1, CHUNK_BYTES // (gradient.shape[1] * 4))
        for start in range(0, gradient.shape[0], size):
            # a factor with a dimension keeps the product in fp32: as a plain scalar it would be rounded to bf16 first
            out[start : start + size] = gradient[start : start + size] * grad.reshape(1, 1)
        return out, None, None, None, None


class _RowLosses(torch.autograd.Function):
    """Loss of every row; the softmax is made again in backward, where each row's upstream gradient is known."""

    @staticmethod
    def forward(ctx, logits, labels, how):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(logits, labels)
        ctx.how = how
        losses, lse, hits = _run(logits.detach(), labels, None, None, how)
        ctx.mark_non_differentiable(lse, hits)
        return losses, lse, hits

    @staticmethod
    def backward(ctx, grad, *unused):  # type: ignore[no-untyped-def]
        logits, labels = ctx.saved_tensors
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _run(logits.detach(), labels, grad.contiguous(), out, ctx.how)
        return out, None, None


def _run(
    logits: Tensor, labels: Tensor, coefficients: Tensor | None, out: Tensor | None, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, lse, hits), each (N,); out (N, V), which may be logits itself, receives the gradient."""
    options, impl, shard = how
    n_rows, vocabulary = logits.shape
    whole = shard.vocabulary if shard else vocabulary
    if impl == "triton":
        from . import row_statistics
        from . import triton_tier as kernels

        z = with_adjacent_columns(logits)
        stats = row_statistics.statistics(z, labels, options)
        rows = finish_rows(stats, whole, options, shard)
        if out is not None and coefficients is not None:
            into = out if out.stride(1) == 1 else torch.empty_like(z)
            kernels.to_gradient(z, whole, labels, stats.own, rows, coefficients, options, out=into)
            if into is not out:
                out.copy_(into)
        return rows.losses, rows.lse, rows.hits
    losses = logits.new_empty(n_rows, dtype=wide_dtype(logits.dtype))
    lse, hits = torch.empty_like(losses), logits.new_empty(n_rows, dtype=torch.bool)
    size = max(1, CHUNK_BYTES // (vocabulary * losses.element_size()))
    for start in range(0, n_rows, size):
        part = slice(start, start + size)
        z = logits[part].to(losses.dtype, copy=True)
        scale = None if out is None or coefficients is None else coefficients[part]
        losses[part], lse[part], hits[part] = consume_logits(z, labels[part], scale, options, shard)
        if out is not None:
            out[part] = z
    return losses, lse, hits
