"""What all implementations of the loss share: its options, a row's results, and a head that is split over ranks.

A head whose vocabulary is split over the ranks of a group (tensor parallelism):

    rank r holds weight[first_r : first_r + V_r];   hidden, targets and all options are the same on every rank

Two small exchanges per chunk of rows, of two numbers each: the largest rival and the target's logit (maximum), then the
rivals' sum of exponentials and, with label smoothing, the sum of logits (sum). Each rank then makes the gradient of its own
columns; d_hidden is summed over the group once, d_weight stays where its shard is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
Products = Literal["auto", "triton", "torch"]


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


class LossOptions(NamedTuple):
    """What shapes the loss of a row. Plain numbers, so that a torch operator takes them flat: `operator(..., *options)`.

    softcap: 0 means none. products: who multiplies in the Triton tier, its own kernels or torch (cuBLAS on a GPU); auto: as the
    line of tuning/linear_cross_entropy.json says. The other tiers multiply with torch.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    products: str = "auto"


def check_options(
    name: str,
    targets: Tensor,
    token_weights: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
    normalizer: float | Tensor | None,
) -> None:
    """Raises ValueError for options that no loss can have."""
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(f"{name}: expected token_weights of shape {tuple(targets.shape)}; got {tuple(token_weights.shape)}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction={reduction!r}; expected 'mean', 'sum' or 'none'.")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"{name}: normalizer divides a mean; got it with reduction={reduction!r}. Drop one of the two.")
    if not 0.0 <= label_smoothing <= 1.0 or (softcap is not None and not softcap > 0):
        raise ValueError(f"{name}: label_smoothing={label_smoothing} must be in [0, 1], softcap={softcap} positive or None.")


def known_labels(targets: Tensor, valid: Tensor, vocabulary: int) -> Tensor:
    """Int64 (R,): the targets, 0 where `valid` is False, -1 where there is no such token: the loss of that row is inf.

    A target outside the vocabulary is a fault of the data; it must neither look like a loss nor wait for the GPU to be found.
    """
    labels = targets.to(torch.int64)
    exists = (labels >= 0) & (labels < vocabulary)
    return torch.where(valid, torch.where(exists, labels, -1), 0)


def row_coefficients(
    valid: Tensor, weights: Tensor | None, reduction: str, normalizer: float | Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What each row's loss is multiplied by (R,), 0 where ignored, and the number of rows with loss."""
    coefficients = valid.to(dtype) if weights is None else torch.where(valid, weights.detach().to(dtype), 0.0)
    count = valid.sum()
    if reduction == "mean":
        coefficients = coefficients / (count.clamp(min=1) if normalizer is None else normalizer)
    return coefficients, count


def weighted(losses: Tensor, coefficients: Tensor) -> Tensor:
    """losses x coefficients; not only the product, because an ignored row may hold inf or nan, and 0 * inf is nan."""
    return torch.where(coefficients != 0, losses * coefficients, 0.0)


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the head: rows first .. first + weight.shape[0] of `vocabulary`. group None: all ranks."""

    first: int
    vocabulary: int
    group: dist.ProcessGroup | None = None

    def local(self, labels: Tensor, rows: int) -> Tensor:
        """labels counted from this shard's first row; -1 where another rank holds them."""
        return torch.where((labels >= self.first) & (labels < self.first + rows), labels - self.first, -1)


@dataclass(frozen=True)
class Statistics:
    """Per row: largest rival and sum of exponentials relative to it, over tiles (R, tiles); the target's logit (R,).

    total: sum of all logits per tile, or None. own is -inf where no tile holds the label.
    """

    tile_max: Tensor
    tile_sum: Tensor
    total: Tensor | None
    own: Tensor

    def of_tiles(self, first: int, last: int) -> Statistics:
        """The same memory, of these tiles alone."""
        total = None if self.total is None else self.total[:, first:last]
        return Statistics(self.tile_max[:, first:last], self.tile_sum[:, first:last], total, self.own)


class RowResults(NamedTuple):
    """What is known of each row once its statistics are together, (R,) each; the same on every rank of a sharded head.

    softmax = exp(z - top) / sum_exp: more exact than exp(z - lse) where all logits share a large offset.
    """

    lse: Tensor
    losses: Tensor
    hits: Tensor
    top: Tensor
    sum_exp: Tensor


def finish_rows(stats: Statistics, vocabulary: int, options: LossOptions, shard: VocabularyShard | None = None) -> RowResults:
    """The rows' results from their tiles' statistics."""
    rival, own = stats.tile_max.amax(1), stats.own
    if shard is not None:
        both = torch.stack((rival, own))
        dist.all_reduce(both, dist.ReduceOp.MAX, group=shard.group)
        rival, own = both.unbind()
    shift = torch.where(rival == float("-inf"), 0.0, rival)  # a vocabulary of one token has no rival
    others = (stats.tile_sum * torch.exp(stats.tile_max - shift[:, None])).sum(1)
    total = None if stats.total is None else stats.total.sum(1)
    if shard is not None:
        sums = torch.stack((others, others if total is None else total))
        sum_over(shard, sums)
        others, total = sums[0], None if total is None else sums[1]
    top = torch.maximum(shift, own)
    sum_exp = others * torch.exp(shift - top) + torch.exp(own - top)
    mean = None if total is None else total / vocabulary
    return RowResults(top + sum_exp.log(), row_losses(top, sum_exp, own, mean, options), own > rival, top, sum_exp)


def row_losses(top: Tensor, sum_exp: Tensor, own: Tensor, mean: Tensor | None, options: LossOptions) -> Tensor:
    """Loss per row; differences of logits are taken before the small logarithm is added."""
    log_sum = sum_exp.log()
    if options.label_smoothing < 1:
        losses = (1 - options.label_smoothing) * (log_sum + (top - own))
    else:
        # of a target outside the vocabulary inf, as 0 * inf would be nan
        losses = torch.zeros_like(own).masked_fill(own == float("-inf"), float("inf"))
    if mean is not None:
        losses += options.label_smoothing * (log_sum + (top - mean))
    return losses + options.z_loss * (top + log_sum).square() if options.z_loss else losses


def sum_over(shard: VocabularyShard, values: Tensor) -> None:
    """Sum in place over the shard's group."""
    dist.all_reduce(values, dist.ReduceOp.SUM, group=shard.group)
