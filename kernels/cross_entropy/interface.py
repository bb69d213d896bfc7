"""Linear + cross-entropy without materialising the logits, computing only the rows that carry loss.

    z = softcap(x @ w.T)                         softcap(a) = c * tanh(a / c), or a
    loss_t = (1 - s) * (lse_t - z_t[target]) + s * (lse_t - mean_v z_t) + k * lse_t**2      s smoothing, k z_loss
    loss = sum_t coefficient_t * loss_t          coefficient: token weight, over the normaliser for "mean", 0 where ignored

Shapes: N tokens, R rows with loss (padded), H model, V vocabulary.
Method: rows with loss are gathered; a chunk of rows is projected, its logits are turned into their own gradient in
place and used for dX and dW at once; dW is summed in fp32 and cast once. "sum" and "mean" have their gradients when the
forward pass ends; "none" projects again in backward, because only there each row's upstream gradient is known.
Precision: the matrix products run in hidden's dtype (under autocast: in autocast's), weight is cast to it; losses,
softmax and sums are fp32 (fp64 for fp64 inputs). d_hidden and d_weight have the dtypes of hidden and weight.
Bench:  python -m chatmill.kernels.bench linear_cross_entropy
Source: maths after "Cut Your Losses" (arXiv:2411.09009) and Liger-Kernel's chunking (arXiv:2410.10989); own design and code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl, choose, why_no_triton
from ..layer.rms_norm import rms_norm
from ..tensors import wide_dtype
from .operators import GatherRows, ShardedLoss, rows_op, spread, sum_op
from .reference import linear_cross_entropy_reference
from .rows import (
    LossMetrics,
    LossOptions,
    Products,
    Reduction,
    VocabularyShard,
    check_options,
    known_labels,
    row_coefficients,
    weighted,
)

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    impl: Impl = "auto",
    rows: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm: Callable[[Tensor], Tensor] | None = None,
    shard: VocabularyShard | None = None,
    products: Products = "auto",
    return_metrics: bool = False,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against targets, with gradients for hidden, weight and norm_weight.

    hidden (N, H); weight (V, H); targets Int (N,), ignore_index = no loss. token_weights Float (N,): factor of each
    token's whole loss (smoothing and z-loss included); no gradient flows into it. reduction "mean" divides by
    `normalizer` (for example the token count of all ranks; number or scalar tensor) or, without one, by the count of
    tokens with loss (not by the sum of token_weights); 0 when there is none. "none" gives (N,), differentiable per token.
    rows Int (R,): indices of the tokens with loss, -1 = padding; then nothing waits for the GPU. Without it they are
    looked up, which is one host sync in eager mode.
    norm_weight (H,): apply RMSNorm to the gathered rows first, so tokens without loss are not normalised either.
    norm: applied to the gathered rows in its place: a module, whose weight FSDP gathers around its own forward.
    shard: weight is this rank's part of a head split over the vocabulary; everything else is the same on all its ranks, and
    so are the loss, the metrics and d_hidden (rows.py).
    products: who multiplies in the triton tier, its own kernels or torch (cuBLAS on a GPU); auto: the shipped table.
    return_metrics: return (loss, metrics), as linear_cross_entropy_with_metrics does.
    """
    _check(hidden, weight, targets, rows)
    check_options(NAME, targets, token_weights, label_smoothing, softcap, reduction, normalizer)
    if norm_weight is not None:
        if norm is not None:
            raise ValueError("linear_cross_entropy: norm and norm_weight are two ways to say one thing. Drop one of them.")
        norm = partial(rms_norm, weight=norm_weight, eps=norm_eps, impl="auto" if impl == "torch" else impl)
    if impl == "reference":
        _check_products(products, impl)
        if shard is not None:
            raise ValueError("linear_cross_entropy: impl='reference' knows only the whole head. Set impl=auto for a shard.")
        loss, metrics = linear_cross_entropy_reference(
            hidden if norm is None else norm(hidden),
            weight,
            targets if rows is None else _only_rows(targets, rows, ignore_index),
            ignore_index=ignore_index,
            token_weights=token_weights,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
            normalizer=normalizer,
        )
        return (loss, metrics) if return_metrics else loss  # type: ignore[return-value]

    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype is not torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    n_tokens = hidden.shape[0]
    if rows is None and not torch.compiler.is_compiling():
        rows = (targets != ignore_index).nonzero().squeeze(1)
    elif type(rows) is Tensor and rows.device.type == "cpu" and not torch.compiler.is_compiling():  # not a traced stand-in
        rows = rows[rows >= 0]  # padding is for shapes that a GPU need not ask for; here it costs up to 127 rows of logits
    # rows without loss are made 0, whatever is in them: 0 * inf is nan
    if rows is None:
        labels, factors = targets, token_weights
        valid = labels != ignore_index
        x = torch.where(valid[:, None], hidden, 0)
    else:
        at = rows.clamp(min=0)
        labels = targets.index_select(0, at)
        factors = None if token_weights is None else token_weights.index_select(0, at)
        valid = (rows >= 0) & (labels != ignore_index)
        x = GatherRows.apply(hidden, rows, valid)
    labels = known_labels(labels, valid, weight.shape[0] if shard is None else shard.vocabulary)
    if norm is not None:
        x = norm(x)

    coefficients, count = row_coefficients(valid, factors, reduction, normalizer, wide_dtype(x.dtype))
    obstacles = {"triton": why_no_triton(x.device), "torch": None, "reference": None}
    chosen = choose(NAME, impl, x.device, obstacles)
    _check_products(products, chosen)
    options = LossOptions(label_smoothing, z_loss, softcap or 0.0, products)
    if shard is not None:
        labels = shard.local(labels, weight.shape[0])
        given = None if reduction == "none" else coefficients
        loss, losses, lse, hits = ShardedLoss.apply(x, weight, labels, given, options, chosen, shard)
    elif reduction == "none":
        losses, lse, hits = rows_op(x, weight, labels, *options, chosen)
        loss = losses
    else:
        grad = torch.is_grad_enabled()
        needs = (grad and x.requires_grad, grad and weight.requires_grad)
        loss, losses, lse, hits, _, _ = sum_op(x, weight, labels, coefficients, *options, chosen, *needs)
    if reduction == "none":
        loss = spread(weighted(loss, coefficients), rows, n_tokens)
    if not return_metrics:
        return loss
    lse, losses = (spread(torch.where(valid, t.detach(), 0.0), rows, n_tokens) for t in (lse, losses))
    metrics = LossMetrics(lse, (hits & valid).sum(), count, losses)
    return loss, metrics  # type: ignore[return-value]  # typed: linear_cross_entropy_with_metrics


def linear_cross_entropy_with_metrics(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, LossMetrics]:
    """(loss, metrics) of linear_cross_entropy. options: those of linear_cross_entropy."""
    loss, metrics = linear_cross_entropy(hidden, weight, targets, return_metrics=True, **options)
    return loss, metrics


def _check_products(products: str, chosen: str) -> None:
    if products not in ("auto", "triton", "torch"):
        raise ValueError(f"{NAME}: products={products!r}; expected 'auto', 'triton' or 'torch'.")
    if products == "triton" and chosen != "triton":
        raise ValueError(f"{NAME}: products='triton' needs impl='triton'; impl={chosen!r} multiplies with torch. Leave it out.")


def _only_rows(targets: Tensor, rows: Tensor, ignore_index: int) -> Tensor:
    keep = spread(torch.ones_like(rows, dtype=torch.bool), rows, targets.shape[0])
    return torch.where(keep, targets, ignore_index)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{NAME}: expected hidden (N, H) and weight (V, H); got {tuple(hidden.shape)} and {tuple(weight.shape)}.\n"
            "Flatten batch and sequence: hidden.flatten(0, -2)."
        )
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"{NAME}: expected integer targets of shape ({hidden.shape[0]},); got {tuple(targets.shape)} {targets.dtype}.\n"
            "Flatten the targets like hidden."
        )
    if rows is not None and (rows.dim() != 1 or rows.is_floating_point()):
        raise ValueError(f"{NAME}: expected integer rows (R,); got {tuple(rows.shape)} {rows.dtype}.")
