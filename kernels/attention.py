"""Attention over packed chats: causal, grouped heads, sliding window, soft-cap; forward and backward.

    out[t] = sum_s softmax_s(cap(scale * q[t] . k[s])) v[s],   s in the same document as t, s <= t, t - s < window
    cap(x) = softcap * tanh(x / softcap)

Shapes: T tokens of all documents in one row, Hq query heads, Hk key/value heads (Hq a multiple of Hk), D and Dv channels.
`cu_seqlens` holds the document boundaries; nothing attends across one.
Method: Dao et al., FlashAttention-2, arXiv:2307.08691 and -3, arXiv:2407.08608; tiles planned on the CPU (attention_plan.py).
Tiers:  triton (attention_triton.py), flash-attn, SDPA, FlexAttention, torch (attention_torch.py); dispatch.py chooses.
Bench:  python -m chatmill.kernels.bench attention
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from chatmill.kernels.attention_torch import Rules, attention_backward_torch, attention_forward_torch

Implementation = Literal["auto", "hopper", "triton", "flash", "sdpa", "flex", "torch", "reference"]


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
    """The slow truth: the whole T x T matrix in fp32, or in fp64 where the inputs are.

    Returns out (T, Hq, Dv) in q's dtype and lse (Hq, T); rows outside every document give 0 and -inf. Autograd goes through.
    """
    T, Hq, D = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
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


@torch.library.custom_op("chatmill::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, softcap: float, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) and lse (Hq, T). window 0 and softcap 0.0 mean none; impl: torch or triton."""
    bounds = tuple(cu_seqlens.tolist())
    return attention_forward_torch(q, k, v, bounds, Rules(causal, window, softcap, scale))


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, softcap: float, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    T, Hq, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(T, Hq, v.shape[2]), q.new_empty(Hq, T, dtype=dtype)


@torch.library.custom_op("chatmill::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens: Tensor,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    bounds = tuple(cu_seqlens.tolist())
    return attention_backward_torch(q, k, v, out, lse, dout, dlse, bounds, Rules(causal, window, softcap, scale))


@attention_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens: Tensor,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = attention_backward(q, k, v, out, lse, dout, dlse, cu_seqlens, *ctx.options)
    return dq, dk, dv, None, None, None, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, softcap: float | None, scale: float
) -> None:
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"attention: q, k and v are (T, heads, channels); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0] or k.shape[1] != v.shape[1] or k.shape[2] != q.shape[2]:
        raise ValueError(f"attention: shapes do not agree: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}.")
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"attention: cu_seqlens is int32 (S+1,), starting with 0; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; a query sees at least itself: window >= 1, or None for no limit.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap={softcap}; it must be positive, or None.")
    if not scale > 0:
        raise ValueError(f"attention: scale={scale}; it must be positive.")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    scale: float | None = ...,
    impl: str = ...,
    return_lse: Literal[False] = ...,
    plan: Any = ...,
    max_seqlen: int | None = ...,
    sinks: Tensor | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    scale: float | None = ...,
    impl: str = ...,
    return_lse: Literal[True],
    plan: Any = ...,
    max_seqlen: int | None = ...,
    sinks: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    plan: Any = None,
    max_seqlen: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed documents.

    q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv): any strides. cu_seqlens Int32 (S+1,): document boundaries, None: one document.
    window: tokens seen by a query, itself included. scale: default D ** -0.5.
    sinks (Hq,): one extra logit per head that takes weight and gives no value.
    plan, max_seqlen: what the data stream made from cu_seqlens (attention_plan.make_plan), so that the GPU is never waited for.
    Returns out (T, Hq, Dv), and with return_lse also lse (Hq, T). Rows past cu_seqlens[-1] give 0 and -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q, k, v, cu_seqlens, window, softcap, scale)
    if impl == "reference":
        out, lse = attention_reference(
            q, k, v, cu_seqlens=cu_seqlens, causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks
        )
        return (out, lse) if return_lse else out
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
    out, lse = attention_forward(q, k, v, cu_seqlens, causal, window or 0, softcap or 0.0, scale, "torch")
    if sinks is not None:
        # softmax with one more column of value 0: out shrinks by exp(lse) / (exp(lse) + exp(sink))
        sink = sinks.to(lse.dtype)[:, None]
        inside = lse != -math.inf
        out = out * torch.where(inside, torch.sigmoid(lse - sink), 0.0).t()[..., None].to(out.dtype)
        lse = torch.where(inside, torch.logaddexp(lse, sink), lse)
    return (out, lse) if return_lse else out
