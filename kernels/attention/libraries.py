"""Attention by other libraries, behind our signature: flash-attn 2, 3 and 4 (flash.py), SDPA, FlexAttention.

Each function takes packed q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv) and returns out (T, Hq, Dv). `why_not` says in words what
a library cannot do, before it is called. Libraries are imported when they are used.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .flash import FLASH, flash_attention, why_not_flash
from .reference import document_ids
from .rules import Rules

LIBRARIES = (*FLASH, "sdpa", "flex")


def why_not(
    library: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    *,
    softcap: bool,
    needs_lse: bool,
    deterministic: bool,
) -> str | None:
    """Why one of LIBRARIES cannot do this call; None where it can."""
    if needs_lse:
        return f"{library} gives no log-sum-exp with a gradient"
    if library in FLASH:
        return why_not_flash(library, device, dtype, head_dim, value_dim, softcap=softcap, deterministic=deterministic)
    if library == "sdpa":
        return "SDPA has no soft-cap" if softcap else None
    if device.type not in ("cpu", "cuda"):
        return f"FlexAttention does not run on {device.type}"
    return "FlexAttention has no backward on CPU" if device.type == "cpu" else None


def library_attention(
    library: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    rules: Rules,
    *,
    deterministic: bool,
    complete: bool,
) -> Tensor:
    """Attention by one of LIBRARIES. cu_seqlens None: one document. complete: no rows lie past cu_seqlens[-1]."""
    T = q.shape[0]
    if cu_seqlens is None or complete:
        return _call(library, q, k, v, cu_seqlens, max_seqlen, rules, deterministic)
    # Libraries leave rows past the last document as memory was, in the output and in the gradients.
    outside = (torch.arange(T, device=q.device) >= cu_seqlens[-1].to(q.device))[:, None, None]
    q, k, v = (_ZeroGradient.apply(x, outside) for x in (q, k, v))
    out = _call(library, q, k, v, cu_seqlens, max_seqlen, rules, deterministic)
    return out.masked_fill(outside, 0.0)


class _ZeroGradient(torch.autograd.Function):
    """The tensor itself, whose gradient is 0 in the rows of `outside` (T, 1, 1), whatever comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outside: Tensor) -> Tensor:
        ctx.save_for_backward(outside)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.masked_fill(ctx.saved_tensors[0], 0.0), None


def _call(
    library: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    rules: Rules,
    deterministic: bool,
) -> Tensor:
    T = q.shape[0]
    if library == "flex":
        return flex_attention(q, k, v, document_ids(cu_seqlens, T, q.device), rules)
    longest = T if max_seqlen is None else max_seqlen
    if library == "sdpa":
        return sdpa_attention(q, k, v, cu_seqlens, longest, rules)
    bounds = torch.tensor([0, T], dtype=torch.int32, device=q.device) if cu_seqlens is None else cu_seqlens
    return flash_attention(library, q, k, v, bounds, longest, rules, deterministic=deterministic)


@functools.lru_cache(maxsize=1)
def _varlen_function() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """torch's own packed attention and its keywords, where this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, rules: Rules) -> Tensor:
    """PyTorch's attention: one call for one document, its varlen form for several on a GPU, else a call per document."""
    if cu_seqlens is None:
        return _sdpa_document(q, k, v, rules)
    packed = (
        _varlen_function() if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] == v.shape[2] else None
    )
    if packed is not None and {"scale", "window_size", "enable_gqa"} <= packed[1]:
        bounds = cu_seqlens.to(device=q.device, dtype=torch.int32)
        side = rules.window - 1 if rules.window else -1
        options = {"scale": rules.scale, "window_size": (side, 0 if rules.causal else side)}
        return packed[0](q, k, v, bounds, bounds, max_seqlen, max_seqlen, enable_gqa=q.shape[1] != k.shape[1], **options)
    bounds_list = cu_seqlens.tolist()
    parts = [_sdpa_document(q[a:b], k[a:b], v[a:b], rules) for a, b in pairwise(bounds_list) if b > a]
    if bounds_list[-1] < q.shape[0]:
        parts.append(q.new_zeros(q.shape[0] - bounds_list[-1], q.shape[1], v.shape[2]))
    return torch.cat(parts)


def _sdpa_document(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    qh, kh, vh = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mask = None
    if rules.window and rules.window < q.shape[0]:
        rows = torch.arange(q.shape[0], device=q.device)
        distance = rows[:, None] - rows[None]
        mask = (distance < rules.window) & (distance >= (0 if rules.causal else 1 - rules.window))
    out = F.scaled_dot_product_attention(
        qh,
        kh,
        vh,
        attn_mask=mask,
        is_causal=rules.causal and mask is None,
        scale=rules.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, rules: Rules) -> Tensor:
    """FlexAttention with a block mask from document numbers (T,), built for this call."""
    from torch.nn.attention.flex_attention import create_block_mask

    causal, window, softcap, scale = rules

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        pair = documents[i] == documents[j]
        if causal:
            pair = pair & (j <= i)
        if window:
            pair = pair & (i - j < window) & (j - i < window)
        return pair

    def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    T = q.shape[0]
    block_mask = create_block_mask(seen, None, None, T, T, device=str(q.device))
    out = _compiled_flex()(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        score_mod=cap if softcap else None,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)
