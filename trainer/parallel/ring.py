"""Ring attention over striped batches: queries stay, keys and values go around, partial results are merged by log-sum-exp.

Rank r of C holds the tokens r, r + C, r + 2C ... of a batch (data/packing/division.py). In step s it has the keys of rank
j = r - s (mod C), row b of them being token bC + j. Its query row a sees rows b <= a, or b <= a - 1 where j > r (s > r): moving
those keys down by one row makes every step causal attention of equal lengths, which every tier of kernels/attention has:
    key row a is the token s places before query row a;   a window of W tokens is one of ceil((W - s) / C) rows
A row whose key lies before its document (position < s) counts for nothing in that step. Steps s >= W are left out.
The backward pass goes around once more, with gradients of keys and values that follow them and come home in the end.

Source: Liu et al., arXiv:2310.01889; stripes: Brandon et al., arXiv:2311.09431.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from ...kernels.attention.interface import block_impl
from ...kernels.attention.operators import block_backward, block_forward, merge
from ...kernels.attention.rules import Rules
from ...kernels.tensors import wide_dtype
from .grid import arrived


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    bounds: Sequence[Tensor],
    group: dist.ProcessGroup,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out (T/C, Hq, Dv) and lse (Hq, T/C) of this rank's queries ["T/C Hq D"], over its documents' keys on all ranks.

    positions Int["T/C"]: in the documents. bounds: of every step, Int32 on the host (Division.ring). Collective.
    """
    rules = Rules(True, window or 0, softcap or 0.0, q.shape[-1] ** -0.5 if scale is None else float(scale))
    impl = block_impl(impl, q, v, rules.softcap)
    out, lse = _Ring.apply(q, k, v, positions, tuple(bounds), group, rules, impl)
    return out, lse


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        bounds: tuple[Tensor, ...],
        group: dist.ProcessGroup,
        rules: Rules,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        rank, steps = dist.get_rank(group), _steps(rules, len(bounds))
        shapes = (k.shape, v.shape)
        held, out, lse = torch.cat([k.flatten(), v.flatten()]), q, q  # the first step sets out and lse
        for step in range(steps):
            coming = _passed_on(held, 1, group) if step + 1 < steps else None
            keys, values = _keys(held, shapes, step > rank)
            part, part_lse = block_forward(q, keys, values, bounds[step], _rules(rules, step, len(bounds)), impl)
            if step == 0:  # every query sees itself: lse is finite
                out, lse = part.to(wide_dtype(q.dtype)), part_lse
            else:
                out, lse = merge(out, lse, part, part_lse.masked_fill(positions < step, -math.inf))
            if coming is not None:
                held = arrived(coming)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, positions, out, lse)
        ctx.options = bounds, group, rules, impl
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, positions, out, lse = ctx.saved_tensors
        bounds, group, rules, impl = ctx.options
        dout, dlse = gradients
        if dout is None:
            dout = torch.zeros_like(out)
        ranks, rank, wide = len(bounds), dist.get_rank(group), wide_dtype(q.dtype)
        steps, shapes = _steps(rules, ranks), (k.shape, v.shape)
        held = torch.cat([k.flatten(), v.flatten()])
        dq, dheld = torch.zeros_like(q, dtype=wide), torch.zeros_like(held, dtype=wide)
        for step in range(steps):
            coming = _passed_on(held, 1, group) if step + 1 < steps else None
            keys, values = _keys(held, shapes, step > rank)
            none = positions < step
            here, within = dout.masked_fill(none[:, None, None], 0), lse.masked_fill(none, math.inf)
            dl = None if dlse is None else dlse.masked_fill(none, 0)
            saved = (q, keys, values, out, within, here, dl)
            found = block_backward(*saved, bounds[step], _rules(rules, step, ranks), impl)
            dq += found[0]
            for into, gradient in zip(_split(dheld, shapes), found[1:], strict=True):
                if step > rank:  # the keys were moved down by one row
                    into[:-1] += gradient[1:]
                else:
                    into += gradient
            if coming is not None:
                held, dheld = arrived(coming), arrived(_passed_on(dheld, 1, group))
        dheld = arrived(_passed_on(dheld, ranks - (steps - 1), group)) if steps > 1 else dheld
        dk, dv = _split(dheld, shapes)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _steps(rules: Rules, ranks: int) -> int:
    """How far the keys go around: no query sees those of a later step."""
    return min(ranks, rules.window) if rules.window else ranks


def _rules(rules: Rules, step: int, ranks: int) -> Rules:
    """The rules of one step, with its window in rows."""
    return rules._replace(window=-(-(rules.window - step) // ranks)) if rules.window else rules


def _keys(held: Tensor, shapes: tuple[torch.Size, torch.Size], moved: bool) -> list[Tensor]:
    """Keys and values, moved down by one row where they come from a rank behind this one; the first row then counts not."""
    parts = _split(held, shapes)
    return [torch.cat([part[:1], part[:-1]]) for part in parts] if moved else parts


def _split(held: Tensor, shapes: tuple[torch.Size, torch.Size]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(held.split([shape.numel() for shape in shapes]), shapes, strict=True)]


def _passed_on(x: Tensor, places: int, group: dist.ProcessGroup) -> Tensor:
    """Start to send x to the rank so many places on, and to receive what comes from as many places before."""
    size = dist.get_world_size(group)
    return collectives.permute_tensor(x, [(rank + places) % size for rank in range(size)], group)
