"""The slow truth of packed attention: the whole T x T matrix, in plain torch operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tensors import wide_dtype


def document_ids(cu_seqlens: Tensor | None, T: int, device: torch.device) -> Tensor:
    """Int64 (T,) number of the document of each row; rows past the last boundary get -1."""
    if cu_seqlens is None:
        return torch.zeros(T, dtype=torch.int64, device=device)
    rows = torch.arange(T, device=device)
    ids = torch.searchsorted(cu_seqlens.to(device=device, dtype=torch.int64), rows, right=True) - 1
    return ids.masked_fill(rows >= cu_seqlens[-1].to(device), -1)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed documents in fp32, or in fp64 where the inputs are.

    Returns out (T, Hq, Dv) in q's dtype and lse (Hq, T); rows outside every document give 0 and -inf. Autograd goes through.
    """
    T, Hq, D = q.shape
    dtype = wide_dtype(q.dtype)
    group = Hq // k.shape[1]
    qh, kh, vh = q.to(dtype).transpose(0, 1), *(x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = qh @ kh.transpose(1, 2) * (D**-0.5 if scale is None else scale)  # (Hq, T, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    ids, rows = document_ids(cu_seqlens, T, q.device), torch.arange(T, device=q.device)
    distance = rows[:, None] - rows[None]
    seen = (ids[:, None] == ids[None]) & (ids[:, None] >= 0)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks.to(dtype)[:, None, None].expand(Hq, T, 1)
        scores = torch.cat([scores, column.masked_fill((ids < 0)[None, :, None], -math.inf)], 2)
    lse = torch.logsumexp(scores, 2)
    inside = (ids >= 0)[None, :, None]
    weights = torch.where(inside, scores.masked_fill(~inside, 0.0).softmax(2), torch.zeros((), dtype=dtype, device=q.device))
    out = weights[:, :, :T] @ vh
    return out.transpose(0, 1).to(q.dtype), lse
