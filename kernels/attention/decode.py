"""Attention of one new token per conversation against its cache of keys and values: the decoding form.

    out[b] = sum_s softmax_s(cap(scale * q[b] . k[b, s])) v[b, s],   s < lengths[b], s >= lengths[b] - window

Shapes: B conversations, Hq query heads, Hk key/value heads, C cache rows, D and Dv channels; lengths count the new token.
Method: split-K (Flash-Decoding): the cache is cut into `splits` stretches so that one conversation fills a GPU. The query heads
of a key head form one matrix tile, so the cache is read once. A second kernel merges the stretches by their log-sum-exp.
No gradient: generation only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose
from ..tensors import wide_dtype
from .interface import why_not_triton
from .rules import Rules


def decode_attention_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, rules: Rules) -> Tensor:
    """The whole score matrix in fp32 (fp64 for fp64); also the fast path on a CPU, where the cache is read once either way."""
    B, Hq, D = q.shape
    C, Hk = k_cache.shape[1:3]
    dtype = wide_dtype(q.dtype)
    grouped = q.to(dtype).view(B, Hk, Hq // Hk, D)
    scores = torch.einsum("bhgd,bchd->bhgc", grouped, k_cache.to(dtype)) * rules.scale
    if rules.softcap:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    rows, ends = torch.arange(C, device=q.device), lengths.to(q.device)[:, None]
    seen = rows < ends
    if rules.window:
        seen = seen & (rows >= ends - rules.window)
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    # rows past the length may hold anything, even NaN
    values = v_cache.to(dtype).masked_fill(~seen[:, :, None, None], 0.0)
    return torch.einsum("bhgc,bchd->bhgd", weights, values).reshape(B, Hq, -1).to(q.dtype)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
    splits: int | None = None,
) -> Tensor:
    """Attention of one query per conversation.

    q (B, Hq, D); k_cache (B, C, Hk, D), v_cache (B, C, Hk, Dv), any strides; lengths Int32 (B,): 1..C, the new token included.
    splits: stretches per conversation, default by the cache's size. Returns out (B, Hq, Dv). impl: auto, triton or torch.
    """
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape[:3] != v_cache.shape[:3] or k_cache.shape[0] != q.shape[0]:
        raise ValueError(
            "decode_attention: q is (B, Hq, D), the caches are (B, C, Hk, D); "
            f"got {tuple(q.shape)}, {tuple(k_cache.shape)}, {tuple(v_cache.shape)}."
        )
    if q.shape[1] % k_cache.shape[2] or q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"decode_attention: heads or channels do not agree: q {tuple(q.shape)}, cache {tuple(k_cache.shape)}.")
    rules = Rules(True, window or 0, softcap or 0.0, q.shape[2] ** -0.5 if scale is None else scale)
    obstacle = why_not_triton(q.device, q.dtype, max(q.shape[2], v_cache.shape[3]))
    if choose("decode_attention", impl, q.device, {"triton": obstacle, "torch": None}) == "torch":
        return decode_attention_reference(q, k_cache, v_cache, lengths, rules)
    from .decode_triton import decode_attention_triton

    return decode_attention_triton(q, k_cache, v_cache, lengths, rules, splits)
