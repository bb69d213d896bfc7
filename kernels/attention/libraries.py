"""Attention by other libraries, behind our signature: flash-attn 2/3/4, SDPA, FlexAttention.

Each function takes packed q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv) and returns out (T, Hq, Dv). `why_not` says in words what
a library cannot do, before it is called. Libraries are imported when they are used.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import capability, is_installed
from .reference import document_ids
from .rules import Rules

LIBRARIES = ("flash", "sdpa", "flex")

# newest first: flash-attn 4 (CuTe), 3 (Hopper), 2
FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")


@functools.lru_cache(maxsize=1)
def flash_module() -> str | None:
    """Name of the newest flash-attn that is installed."""
    return next((name for name in FLASH_MODULES if is_installed(name)), None)


def why_not(
    library: str, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, has_softcap: bool, needs_lse: bool
) -> str | None:
    """Why `flash`, `sdpa` or `flex` cannot do this call; None where it can."""
    half = dtype in (torch.float16, torch.bfloat16)
    if library == "flash":
        if flash_module() is None:
            return "flash-attn is not installed"
        if device.type != "cuda" or capability(device) < 80:
            return "flash-attn needs a CUDA GPU of capability 80 or newer"
        if not half:
            return f"flash-attn takes bf16 and fp16, not {dtype}"
        if head_dim > 256 or head_dim != value_dim:
            return f"flash-attn takes equal head dimensions up to 256, not {head_dim} and {value_dim}"
        return "flash-attn's log-sum-exp has no gradient" if needs_lse else None
    if needs_lse:
        return f"{library} returns no log-sum-exp"
    if library == "sdpa":
        return "SDPA has no soft-cap" if has_softcap else None
    if device.type not in ("cpu", "cuda"):
        return f"FlexAttention does not run on {device.type}"
    return "FlexAttention has no backward on CPU" if device.type == "cpu" else None


def library_attention(
    library: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, rules: Rules
) -> Tensor:
    """Attention by one of LIBRARIES. cu_seqlens None: one document."""
    T = q.shape[0]
    if library == "flex":
        return flex_attention(q, k, v, document_ids(cu_seqlens, T, q.device), rules)
    longest = T if max_seqlen is None else max_seqlen
    if library == "sdpa":
        return sdpa_attention(q, k, v, cu_seqlens, longest, rules)
    bounds = torch.tensor([0, T], dtype=torch.int32, device=q.device) if cu_seqlens is None else cu_seqlens
    return flash_attention(q, k, v, bounds, longest, rules)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, rules: Rules) -> Tensor:
    """flash-attn's varlen function, whichever version is installed."""
    name = flash_module()
    assert name is not None
    function = importlib.import_module(name).flash_attn_varlen_func
    options: dict[str, Any] = {"softmax_scale": rules.scale, "causal": rules.causal}
    if rules.window:
        options["window_size"] = (rules.window - 1, 0 if rules.causal else rules.window - 1)
    if rules.softcap:
        options["softcap"] = rules.softcap
    bounds = cu_seqlens.to(device=q.device, dtype=torch.int32)
    out = function(
        q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, **options
    )
    return out[0] if isinstance(out, tuple) else out


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
