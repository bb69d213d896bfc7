"""Chunked linear cross-entropy in plain torch, for CPUs and for machines without Triton.

One reused buffer of CHUNK_BYTES holds a chunk's logits, becomes its softmax, then its gradient. Contract and maths in
interface.py; here every row is computed and ignored ones have coefficient 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import wide_dtype
from .rows import LossOptions, Statistics, VocabularyShard, finish_rows, row_losses, sum_over

# 256 rows of a 49k vocabulary: on a CPU a softmax into a new buffer of that size costs ten times as much as in place
CHUNK_BYTES = 48 << 20
# of the head's gradient that one product of narrower numbers makes in addition to the fp32 sums
PRODUCT_BYTES = 64 << 20


def run_torch(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor | None,
    options: LossOptions,
    needs: tuple[bool, bool],
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses (R,), lse (R,), hits (R,), d_x, d_weight) of x (R, H), weight (V, H), labels int64 (R,): [0, V) or -1.

    coefficients (R,) scale each row's gradient. needs: whether d_x, d_weight are wanted; otherwise they come back empty.
    """
    need_x, need_weight = needs
    n_rows, vocabulary = x.shape[0], weight.shape[0]
    sums = wide_dtype(x.dtype)
    losses = x.new_empty(n_rows, dtype=sums)
    lse = torch.empty_like(losses)
    hits = x.new_empty(n_rows, dtype=torch.bool)
    projection = weight.to(x.dtype)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    # the first chunk of what needs no rounding is written, not added
    begun = not (n_rows and x.dtype is sums)
    make = torch.zeros if begun else torch.empty
    d_weight = make(weight.shape, dtype=sums, device=x.device) if need_weight else weight.new_empty(0)
    size = max(1, min(n_rows, CHUNK_BYTES // (vocabulary * losses.element_size())))
    buffer = x.new_empty(size, vocabulary, dtype=sums)
    for start in range(0, n_rows, size):
        part = slice(start, min(start + size, n_rows))
        z = buffer[: part.stop - start]  # (C, V)
        if x.dtype is sums:
            torch.mm(x[part], projection.T, out=z)
        else:
            z.copy_(x[part] @ projection.T)
        scale = coefficients[part] if coefficients is not None and (need_x or need_weight) else None
        losses[part], lse[part], hits[part] = consume_logits(z, labels[part], scale, options, shard)
        if scale is None:
            continue
        gradient = z.to(x.dtype)
        if need_x:
            torch.mm(gradient, projection, out=d_x[part])
        if need_weight and not begun:
            torch.mm(gradient.T, x[part], out=d_weight)
            begun = True
        elif need_weight:
            accumulate(d_weight, gradient, x[part])
    del buffer  # before a narrower weight's gradient is cast, which takes memory of its own
    if shard is not None and need_x:
        sum_over(shard, d_x)
    return losses, lse, hits, d_x, d_weight.to(weight.dtype)


def consume_logits(
    z: Tensor, labels: Tensor, coefficients: Tensor | None, options: LossOptions, shard: VocabularyShard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, lse, hits), each (C,), of raw logits z (C, V), which are overwritten.

    With coefficients (C,) z becomes the gradient of sum(coefficients x losses) with respect to the raw logits.
    """
    label_smoothing, z_loss, softcap = options[:3]
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    slope = 1 - (z / softcap).square_() if softcap and coefficients is not None else None
    held = labels >= 0  # -1 marks a target outside the vocabulary, or in a sharded head one that another rank holds
    label = labels.clamp(min=0)[:, None]
    picked = z.gather(1, label).squeeze(1)  # (C,)
    total = z.sum(1, keepdim=True) if label_smoothing else None
    own = torch.where(held, picked, float("-inf"))
    z.scatter_(1, label, torch.where(held, float("-inf"), picked)[:, None])
    rival = z.amax(1)
    if shard is not None:
        shift = torch.where(rival == float("-inf"), 0.0, rival)[:, None]
        rivals = torch.exp(z - shift).sum(1, keepdim=True)
        z.scatter_(1, label, picked[:, None])
        stats = Statistics(rival[:, None], rivals, total, own)
        lse, losses, hits, top, sum_exp = finish_rows(stats, shard.vocabulary, options, shard)
        z.sub_(top[:, None]).exp_().div_(sum_exp[:, None])
    else:
        z.scatter_(1, label, picked[:, None])
        hits = own > rival
        top = torch.maximum(rival, own)
        torch.softmax(z, 1, out=z)
        sum_exp = 1 / z.amax(1)  # the largest probability is 1 / sum exp(z - top): no second exponential
        lse = top + sum_exp.log()
        mean = None if total is None else total.squeeze(1) / z.shape[1]
        losses = row_losses(top, sum_exp, own, mean, options)
    if coefficients is not None:
        scale = coefficients[:, None]
        z.mul_(scale * (1 + 2 * z_loss * lse[:, None]))
        if label_smoothing:
            z.sub_(scale * (label_smoothing / (shard.vocabulary if shard else z.shape[1])))
        # the one-hot is subtracted before any rounding to the working precision
        z.scatter_add_(1, label, (label_smoothing - 1) * torch.where(held[:, None], scale, 0.0))
        if slope is not None:
            z.mul_(slope)
        dead = coefficients == 0
        if z.device.type != "cpu" or bool(dead.any()):  # reading a GPU's answer would wait for it
            z.masked_fill_(dead[:, None], 0.0)  # a row without loss may hold inf or nan, and 0 * inf is nan
    return losses, lse, hits


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, H) fp32 += left (C, V).T @ right (C, H), without rounding the product to bf16 where the device can."""
    if left.dtype is total.dtype:
        total.addmm_(left.T, right)
        return
    step = max(1, PRODUCT_BYTES // (total.shape[1] * total.element_size()))
    for start in range(0, total.shape[0], step):  # in slices: the product would be as large as total
        part = slice(start, start + step)
        if left.is_cuda:
            total[part].add_(torch.mm(left[:, part].T, right, out_dtype=total.dtype))
        else:
            total[part].add_(left[:, part].T @ right)
