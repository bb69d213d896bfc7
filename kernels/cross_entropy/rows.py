"""A head whose vocabulary is split over the ranks of a group (tensor parallelism), and what those ranks must tell each other.

    rank r holds weight[first_r : first_r + V_r];   hidden, targets and all options are the same on every rank

Two small exchanges per chunk of rows, of two numbers each: the largest rival and the target's logit (maximum), then the
rivals' sum of exponentials and, with label smoothing, the sum of logits (sum). Each rank then makes the gradient of its own
columns; d_hidden is summed over the group once, d_weight stays where its shard is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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

    total: sum of all logits per tile, or None. own is -inf where no tile held the label.
    """

    tile_max: Tensor
    tile_sum: Tensor
    total: Tensor | None
    own: Tensor


class Rows(NamedTuple):
    """What is known of each row once its statistics are together, (R,) each; the same on every rank of a sharded head.

    softmax = exp(z - top) / sum_exp: more exact than exp(z - lse) where all logits share a large offset.
    """

    lse: Tensor
    losses: Tensor
    hits: Tensor
    top: Tensor
    sum_exp: Tensor


def finish_rows(
    stats: Statistics, vocabulary: int, label_smoothing: float, z_loss: float, shard: VocabularyShard | None = None
) -> Rows:
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
    return Rows(top + sum_exp.log(), row_losses(top, sum_exp, own, mean, label_smoothing, z_loss), own > rival, top, sum_exp)


def row_losses(top: Tensor, sum_exp: Tensor, own: Tensor, mean: Tensor | None, label_smoothing: float, z_loss: float) -> Tensor:
    """Loss per row; differences of logits are taken before the small logarithm is added."""
    log_sum = sum_exp.log()
    losses = (1 - label_smoothing) * (log_sum + (top - own))
    if mean is not None:
        losses += label_smoothing * (log_sum + (top - mean))
    return losses + z_loss * (top + log_sum).square() if z_loss else losses


def sum_over(shard: VocabularyShard, values: Tensor) -> None:
    """Sum in place over the shard's group."""
    dist.all_reduce(values, dist.ReduceOp.SUM, group=shard.group)
