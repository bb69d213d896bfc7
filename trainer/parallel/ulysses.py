"""Attention across ranks by exchanging heads: every rank attends over the whole batch with some of the heads.

    (T/C, Hq, D) by tokens  -all-to-all->  (T, Hq/C, D) by heads, attention, (T, Hq/C, D)  -all-to-all->  (T/C, Hq, D)

Rank r of C holds the tokens r, r + C, r + 2C ... (data/packing/division.py), so the pieces interleave. One exchange
carries queries, keys and values. Key heads that C does not divide are repeated until it does. Autograd goes through.
Source: Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from ...kernels.attention import attention
from .grid import arrived


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, ranks: int, **options: Any) -> Tensor:
    """out (T/C, Hq, Dv) of this rank's tokens. options: those of kernels.attention, for the whole batch. Collective."""
    heads, kv_heads = q.shape[1], k.shape[1]
    repeats = math.lcm(kv_heads, ranks) // kv_heads
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    own = (heads // ranks, kv_heads * repeats // ranks, kv_heads * repeats // ranks)
    channels = (q.shape[2], k.shape[2], v.shape[2])
    widths = [count * size for count, size in zip(own, channels, strict=True)]
    together = torch.cat([x.reshape(x.shape[0], ranks, -1).transpose(0, 1) for x in (q, k, v)], dim=2)  # (C, T/C, widths)
    whole = _exchange(together, group).transpose(0, 1).reshape(-1, sum(widths))  # token aC + r from row a of rank r
    parts = [x.unflatten(1, (-1, size)) for x, size in zip(whole.split(widths, 1), channels, strict=True)]
    out = attention(*parts, **options)
    back = _exchange(out.view(-1, ranks, own[0] * channels[2]).transpose(0, 1).contiguous(), group)
    return back.transpose(0, 1).reshape(-1, heads, channels[2])


class _Exchange(torch.autograd.Function):
    """Piece r of x (C, ...) goes to rank r, whose piece of this rank's number comes back; so do gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return arrived(collectives.all_to_all_single(x, None, None, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return arrived(collectives.all_to_all_single(gradient.contiguous(), None, None, ctx.group)), None


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _Exchange.apply(x, group)
