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
from dataclasses import dataclass
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from ..dispatch import choose, why_no_triton
from ..layer.rms_norm import rms_norm
from .rows import VocabularyShard
from .torch_tier import run_torch

# of a gradient that are scaled at once on a CPU
SCALED_ELEMENTS = 1 << 22
Impl = Literal["auto", "triton", "torch", "reference"]
Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True, slots=True)
class LossMetrics:
    """By-products of the loss, detached; no second pass over the logits was made for them.

    lse: log-sum-exp of the logits per token, Float["N"], 0 where ignored. correct: tokens whose target has the strictly
    largest logit (a tie is no hit), int64 scalar. count: tokens with loss, int64 scalar.
    token_losses: unreduced loss before token_weights, Float["N"], 0 where ignored.
    """

    lse: Tensor | None
    correct: Tensor
    count: Tensor
    token_losses: Tensor | None = None


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = ...,
    token_weights: Tensor | None = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    normalizer: float | Tensor | None = ...,
    impl: Impl = ...,
    rows: Tensor | None = ...,
    norm_weight: Tensor | None = ...,
    norm_eps: float = ...,
    norm: Callable[[Tensor], Tensor] | None = ...,
    shard: VocabularyShard | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = ...,
    token_weights: Tensor | None = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    normalizer: float | Tensor | None = ...,
    impl: Impl = ...,
    rows: Tensor | None = ...,
    norm_weight: Tensor | None = ...,
    norm_eps: float = ...,
    norm: Callable[[Tensor], Tensor] | None = ...,
    shard: VocabularyShard | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, LossMetrics]: ...


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
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, LossMetrics]:
    """Cross-entropy of `hidden @ weight.T` against targets, with gradients for hidden, weight and norm_weight.

    hidden (N, H); weight (V, H); targets Int (N,), ignore_index = no loss. token_weights Float (N,): factor of each
    token's whole loss (smoothing and z-loss included); no gradient flows into it. reduction "mean" divides by
    `normalizer` (for example the token count of all ranks; number or scalar tensor) or, without one, by the count of
    tokens with loss (not by the sum of token_weights); 0 when there is none. "none" gives (N,), differentiable per token.
    rows Int (R,): indices of the tokens with loss, -1 = padding; then nothing waits for the GPU. Without it they are
    looked up, which is one host sync in eager mode.
    norm_weight (H,): apply RMSNorm to the gathered rows first, so tokens without loss are not normalised either.
    norm: applied to the gathered rows in its place: a module, whose engine gathers its weight around its own forward.
    shard: weight is this rank's part of a head split over the vocabulary; everything else is the same on all its ranks, and
    so are the loss, the metrics and d_hidden (vocabulary_shard.py).
    """
    _check(hidden, weight, targets, token_weights, label_smoothing, softcap, reduction, normalizer, rows)
    if norm_weight is not None:
        if norm is not None:
            raise ValueError("linear_cross_entropy: norm and norm_weight are two ways to say one thing. Drop one of them.")
        norm = partial(rms_norm, weight=norm_weight, eps=norm_eps, impl="auto" if impl == "torch" else impl)
    if impl == "reference":
        if shard is not None:
            raise ValueError("linear_cross_entropy: impl='reference' knows the whole head alone. Set impl=auto for a shard.")
        kept = targets if rows is None else _only_rows(targets, rows, ignore_index)
        states = hidden if norm is None else norm(hidden)
        loss, metrics = linear_cross_entropy_reference(
            states,
            weight,
            kept,
            ignore_index=ignore_index,
            token_weights=token_weights,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
            normalizer=normalizer,
        )
        return (loss, metrics) if return_metrics else loss

    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype is not torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    n_tokens = hidden.shape[0]
    if rows is None and not torch.compiler.is_compiling():
        rows = (targets != ignore_index).nonzero().squeeze(1)
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
        x = _GatherRows.apply(hidden, rows, valid)
    labels = torch.where(valid, labels, 0).to(torch.int64)
    if norm is not None:
        x = norm(x)

    sums = torch.float64 if x.dtype is torch.float64 else torch.float32
    coefficients = valid.to(sums) if factors is None else torch.where(valid, factors.detach().to(sums), 0.0)
    count = valid.sum()
    if reduction == "mean":
        coefficients = coefficients / (count.clamp(min=1) if normalizer is None else normalizer)
    obstacles = {"triton": why_no_triton(x.device), "torch": None, "reference": None}
    engine = choose("linear_cross_entropy", impl, x.device, obstacles)
    options = (label_smoothing, z_loss, softcap or 0.0, engine)
    if shard is not None:
        labels = shard.local(labels, weight.shape[0])
        row_coefficients = None if reduction == "none" else coefficients
        loss, losses, lse, hits = _ShardedLoss.apply(x, weight, labels, row_coefficients, options, shard)
        if reduction == "none":
            loss = _spread(torch.where(coefficients != 0, loss * coefficients, 0.0), rows, n_tokens)
    elif reduction == "none":
        losses, lse, hits = _rows_op(x, weight, labels, *options)
        loss = _spread(torch.where(coefficients != 0, losses * coefficients, 0.0), rows, n_tokens)
    else:
        grad = torch.is_grad_enabled()
        needs = (grad and x.requires_grad, grad and weight.requires_grad)
        loss, losses, lse, hits, _, _ = _sum_op(x, weight, labels, coefficients, *options, *needs)
    if not return_metrics:
        return loss
    lse, losses = (_spread(torch.where(valid, t.detach(), 0.0), rows, n_tokens) for t in (lse, losses))
    return loss, LossMetrics(lse, (hits & valid).sum(), count, losses)


def linear_cross_entropy_reference(
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
) -> tuple[Tensor, LossMetrics]:
    """The formula of the header in plain torch operations: all logits, autograd's own gradients, no row skipped."""
    logits = (hidden @ weight.to(hidden.dtype).T).to(torch.float64 if hidden.dtype is torch.float64 else torch.float32)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = targets != ignore_index
    labels = torch.where(valid, targets, 0).to(torch.int64)[:, None]
    lse = torch.logsumexp(logits, dim=1)
    own = logits.gather(1, labels)
    losses = (1 - label_smoothing) * (lse - own.squeeze(1)) + label_smoothing * (lse - logits.mean(1)) + z_loss * lse**2
    losses = torch.where(valid, losses, 0.0)
    weighted = losses if token_weights is None else losses * torch.where(valid, token_weights.detach(), 0.0)
    count = valid.sum()
    loss = weighted
    if reduction != "none":
        loss = weighted.sum()
    if reduction == "mean":
        loss = loss / (count.clamp(min=1) if normalizer is None else normalizer)
    with torch.no_grad():
        rivals = logits.scatter(1, labels, float("-inf"))
        hits = own.squeeze(1) > rivals.amax(1)
    return loss, LossMetrics(torch.where(valid, lse, 0.0).detach(), (hits & valid).sum(), count, losses.detach())


class _GatherRows(torch.autograd.Function):
    """hidden[rows] with zero rows where not valid; backward writes each row once (no atomics, so it is deterministic)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, rows: Tensor, valid: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows)
        ctx.n_tokens = hidden.shape[0]
        return hidden.index_select(0, rows.clamp(min=0)).masked_fill_(~valid[:, None], 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        return _spread(grad, rows, ctx.n_tokens), None, None


def _spread(values: Tensor, rows: Tensor | None, n_tokens: int) -> Tensor:
    """values (R, ...) at their token positions in zeros (n_tokens, ...); padding lands in one extra row, cut off."""
    if rows is None:
        return values
    out = values.new_zeros((n_tokens + 1, *values.shape[1:]))
    return out.index_copy(0, torch.where(rows >= 0, rows, n_tokens).to(torch.int64), values)[:n_tokens]


def _only_rows(targets: Tensor, rows: Tensor, ignore_index: int) -> Tensor:
    keep = _spread(torch.ones_like(rows, dtype=torch.bool), rows, targets.shape[0])
    return torch.where(keep, targets, ignore_index)


def _run(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    engine: str,
    need_x: bool,
    need_weight: bool,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses, lse, hits, d_x, d_weight); without coefficients the loss-only path, gradients then empty."""
    if engine == "triton":
        from .triton_tier import run_triton as run
    else:
        run = run_torch
    with torch.autocast(x.device.type, enabled=False):
        return run(x, weight, labels, coefficients, label_smoothing, z_loss, softcap, need_x, need_weight, shard)


@torch.library.custom_op("chatmill::linear_cross_entropy_sum", mutates_args=())
def _sum_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    engine: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum of coefficient x loss, losses (R,), lse (R,), hits (R,), d_x, d_weight); gradients empty unless needed."""
    losses, lse, hits, d_x, d_weight = _run(
        x, weight, labels, coefficients, label_smoothing, z_loss, softcap, engine, need_x, need_weight
    )
    # where, not only a product: an ignored row may hold inf or nan, and 0 * inf is nan
    total = torch.where(coefficients != 0, losses * coefficients, 0.0).sum()
    return total, losses, lse, hits, d_x, d_weight


@_sum_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    engine: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    return (*found, *(None,) * 8)


_sum_op.register_autograd(_sum_backward, setup_context=_sum_setup)


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
def _rows_op(
    x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, softcap: float, engine: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (R,), lse (R,), hits (R,)); differentiable in losses by projecting again in backward."""
    return _run(x, weight, labels, None, label_smoothing, z_loss, softcap, engine, False, False)[:3]


@_rows_op.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, softcap: float, engine: str
) -> tuple[Tensor, Tensor, Tensor]:
    losses = x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    return losses, torch.empty_like(losses), torch.empty_like(losses, dtype=torch.bool)


def _rows_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _rows_backward(ctx, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    x, weight, labels = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    *_, d_x, d_weight = _sum_op(x, weight, labels, grad.contiguous(), *ctx.options, *needs)
    return (d_x if needs[0] else None, d_weight if needs[1] else None, *(None,) * 5)


_rows_op.register_autograd(_rows_backward, setup_context=_rows_setup)


class _ShardedLoss(torch.autograd.Function):
    """The two operators above for a head split over ranks. A process group is no operator argument, hence a Function."""

    @staticmethod
    def forward(ctx, x, weight, labels, coefficients, options, shard):  # type: ignore[no-untyped-def]
        smoothing, z_loss, softcap, engine = options
        need_x, need_weight = ctx.needs_input_grad[:2] if coefficients is not None else (False, False)
        losses, lse, hits, *gradients = _run(
            x, weight, labels, coefficients, smoothing, z_loss, softcap, engine, need_x, need_weight, shard
        )
        ctx.options, ctx.shard, ctx.summed = options, shard, coefficients is not None
        ctx.save_for_backward(*(gradients if ctx.summed else (x, weight, labels)))
        ctx.mark_non_differentiable(lse, hits)
        if coefficients is None:
            return losses, losses.detach().clone(), lse, hits
        return torch.where(coefficients != 0, losses * coefficients, 0.0).sum(), losses, lse, hits

    @staticmethod
    def backward(ctx, grad, *unused):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad[:2]
        if ctx.summed:
            found = [_scaled(d, grad) if need else None for d, need in zip(ctx.saved_tensors, needs, strict=True)]
        else:
            x, weight, labels = ctx.saved_tensors
            smoothing, z_loss, softcap, engine = ctx.options
            *_, d_x, d_weight = _run(
                x, weight, labels, grad.contiguous(), smoothing, z_loss, softcap, engine, needs[0], needs[1], ctx.shard
            )
            found = [d if need else None for d, need in zip((d_x, d_weight), needs, strict=True)]
        return (*found, None, None, None, None)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
    normalizer: float | Tensor | None,
    rows: Tensor | None,
) -> None:
    name = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: expected hidden (N, H) and weight (V, H); got {tuple(hidden.shape)} and {tuple(weight.shape)}.\n"
            "Flatten batch and sequence: hidden.flatten(0, -2)."
        )
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"{name}: expected integer targets of shape ({hidden.shape[0]},); got {tuple(targets.shape)} {targets.dtype}.\n"
            "Flatten the targets like hidden."
        )
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(f"{name}: expected token_weights of shape {tuple(targets.shape)}; got {tuple(token_weights.shape)}.")
    if rows is not None and (rows.dim() != 1 or rows.is_floating_point()):
        raise ValueError(f"{name}: expected integer rows (R,); got {tuple(rows.shape)} {rows.dtype}.")
    check_options(name, label_smoothing, softcap, reduction, normalizer)


def check_options(
    name: str, label_smoothing: float, softcap: float | None, reduction: str, normalizer: float | Tensor | None
) -> None:
    """Raises ValueError for options that no loss can have."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction={reduction!r}; expected 'mean', 'sum' or 'none'.")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"{name}: normalizer divides a mean; got it with reduction={reduction!r}. Drop one of the two.")
    if not 0.0 <= label_smoothing < 1.0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"{name}: label_smoothing={label_smoothing} must be in [0, 1), softcap={softcap} positive or None.")
