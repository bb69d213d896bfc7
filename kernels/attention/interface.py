"""Attention over packed chats: causal, grouped heads, sliding window, soft-cap; forward and backward.

    out[t] = sum_s softmax_s(cap(scale * q[t] . k[s])) v[s],   s in the same document as t, s <= t, t - s < window
    cap(x) = softcap * tanh(x / softcap)

Shapes: T tokens of all documents in one row, Hq query heads, Hk key/value heads (Hq a multiple of Hk), D and Dv channels.
`cu_seqlens` holds the document boundaries; nothing attends across one.
Method: Dao et al., FlashAttention-2, arXiv:2307.08691 and -3, arXiv:2407.08608; tiles planned on the CPU (attention_plan.py).
Tiers:  triton (attention_triton.py), hopper (attention_hopper.py), flash-attn, SDPA, FlexAttention, torch (attention_torch.py);
        dispatch.py chooses.
Bench:  python -m chatmill.kernels.bench attention
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..dispatch import capability, choose, is_planning, why_no_triton
from . import libraries as library
from .device_plan import HOPPER_FORWARD, DevicePlan, plan_attention
from .libraries import why_not
from .torch_tier import Rules, attention_backward_torch, attention_forward_torch

# largest head dimension of the Triton kernels
MAX_HEAD_DIM = 256
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    plan: Tensor | None,
    header: Sequence[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) and lse (Hq, T). window 0 and softcap 0.0 mean none; plan, header: DevicePlan's.

    impl: torch, triton, hopper, or hopper-fused, which differs in the backward alone.
    """
    impl = impl.removesuffix("-fused")
    if impl == "torch":
        return attention_forward_torch(q, k, v, _bounds(cu_seqlens), Rules(causal, window, softcap, scale))
    tiles = _plan(q, v, cu_seqlens, plan, header, causal, window, impl)
    if impl == "hopper":
        from .hopper_forward import attention_forward_hopper

        return attention_forward_hopper(q, k, v, tiles, softcap, scale)
    from .triton_tier import attention_forward_triton

    return attention_forward_triton(q, k, v, tiles, softcap, scale)


@attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    plan: Tensor | None,
    header: Sequence[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    impl: str,
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
    plan: Tensor | None,
    header: Sequence[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    if impl == "torch":
        rules = Rules(causal, window, softcap, scale)
        return attention_backward_torch(q, k, v, out, lse, dout, dlse, _bounds(cu_seqlens), rules)
    tiles = _plan(q, v, cu_seqlens, plan, header, causal, window, impl.removesuffix("-fused"))
    if impl == "hopper-fused":
        from .hopper_backward import attention_backward_hopper

        return attention_backward_hopper(q, k, v, out, lse, dout, dlse, tiles, softcap, scale)
    from .triton_tier import attention_backward_triton

    return attention_backward_triton(q, k, v, out, lse, dout, dlse, tiles, softcap, scale)


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
    plan: Tensor | None,
    header: Sequence[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, plan, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, plan)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, plan = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = attention_backward(q, k, v, out, lse, dout, dlse, cu_seqlens, plan, *ctx.options)
    return (dq, dk, dv, *(None,) * (2 + len(ctx.options)))


attention_forward.register_autograd(_differentiate, setup_context=_save)


def _bounds(cu_seqlens: Tensor) -> tuple[int, ...]:
    return tuple(cu_seqlens.tolist())


def _plan(
    q: Tensor, v: Tensor, cu_seqlens: Tensor, plan: Tensor | None, header: Sequence[int], causal: bool, window: int, impl: str
) -> DevicePlan:
    """The caller's plan where it fits the tier, or one made here: reading cu_seqlens then waits for the GPU."""
    given = None if plan is None else DevicePlan(plan, tuple(header))
    if given is not None and (impl != "hopper" or given.config.forward == HOPPER_FORWARD[q.shape[2]]):
        return given
    made = _made_plan(_bounds(cu_seqlens), q.shape[0], max(q.shape[2], v.shape[2]), q.dtype, window, causal, q.device, impl)
    if made.data.is_cuda:
        _hold(made.data)
    return made


def _hold(tiles: Tensor) -> None:
    """The cache of plans may let go of one while a captured graph will still read it, or kernels of another stream do."""
    if torch.cuda.is_current_stream_capturing():
        _captured[tiles.data_ptr()] = tiles
    else:
        tiles.record_stream(torch.cuda.current_stream(tiles.device))


_captured: dict[int, Tensor] = {}


@functools.lru_cache(maxsize=32)
def _made_plan(
    bounds: tuple[int, ...],
    T: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    causal: bool,
    device: torch.device,
    impl: str,
) -> DevicePlan:
    plan = plan_attention(
        bounds, T, head_dim=head_dim, dtype=dtype, window=window or None, causal=causal, device=device, impl=impl
    )
    return plan.to(device)


@torch.compiler.assume_constant_result
def _decide(
    impl: str,
    device: str,
    dtype: str,
    head_dim: int,
    value_dim: int,
    window: int,
    softcap: float,
    needs_lse: bool,
    packed: bool,
    causal: bool,
) -> str:
    """Implementation by dispatch's table; plain arguments, so that torch.compile takes the answer as a constant."""
    where, kind = torch.device(device), getattr(torch, dtype)
    triton = why_no_triton(where)
    if triton is None and max(head_dim, value_dim) > MAX_HEAD_DIM:
        triton = f"head dimensions up to {MAX_HEAD_DIM}, not {max(head_dim, value_dim)}"
    if triton is None and kind == torch.float64:
        triton = "no float64"
    call = {"device": where, "dtype": kind, "head_dim": head_dim, "value_dim": value_dim}
    call |= {"window": window, "softcap": softcap, "needs_lse": needs_lse, "packed": packed}
    obstacles = {name: why_not(name, **call) for name in ("flash", "sdpa", "flex")}
    obstacles |= {
        "triton": triton,
        "hopper": triton or _why_no_hopper(where, kind, head_dim, value_dim),
        "torch": None,
        "reference": None,
    }
    return choose("attention", impl, where, obstacles, packed=packed)


def _why_no_hopper(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    if device.type != "cuda" and not is_planning():
        return "the Hopper tier runs on a Hopper GPU alone: Triton's interpreter knows no Gluon"
    if device.type == "cuda" and not 90 <= capability(device) < 100:
        return f"the Hopper tier needs compute capability 90, this GPU has {capability(device)}"
    from .hopper_forward import why_not_hopper

    return why_not_hopper(dtype, head_dim, value_dim)


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
    plan: DevicePlan | Mapping[int | None, DevicePlan] | None = ...,
    max_seqlen: int | None = ...,
    sinks: Tensor | None = ...,
    deterministic: bool | None = ...,
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
    plan: DevicePlan | Mapping[int | None, DevicePlan] | None = ...,
    max_seqlen: int | None = ...,
    sinks: Tensor | None = ...,
    deterministic: bool | None = ...,
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
    plan: DevicePlan | Mapping[int | None, DevicePlan] | None = None,
    max_seqlen: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed documents.

    q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv): any strides. cu_seqlens Int32 (S+1,): document boundaries, None: one document.
    window: tokens seen by a query, itself included. scale: default D ** -0.5.
    sinks (Hq,): one extra logit per head that takes weight and gives no value.
    plan: attention_config.plan_attention(...) of these cu_seqlens, or one such per window; max_seqlen: the longest document.
    Given by the data stream, they spare a wait for the GPU.
    deterministic: gradients bitwise equal from run to run; None: torch.are_deterministic_algorithms_enabled(). The triton and
    torch tiers' always are; the Hopper tier has a backward of five matrix products for seven that is not: False allows it.
    Returns out (T, Hq, Dv), and with return_lse also lse (Hq, T). Rows past cu_seqlens[-1] give 0 and -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q, k, v, cu_seqlens, window, softcap, scale)
    # a condition, not its value: with a number of documents that varies, Dynamo has a symbol here, and _decide wants constants
    packed = True if cu_seqlens is not None and cu_seqlens.numel() > 2 else False  # noqa: SIM210
    engine = _decide(
        impl,
        str(q.device),
        str(q.dtype).removeprefix("torch."),
        q.shape[2],
        v.shape[2],
        window or 0,
        softcap or 0.0,
        return_lse or sinks is not None,
        packed,
        causal,
    )
    if engine == "reference":
        out, lse = attention_reference(
            q, k, v, cu_seqlens=cu_seqlens, causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks
        )
        return (out, lse) if return_lse else out
    if engine in ("flash", "sdpa", "flex"):
        return _library(engine, q, k, v, cu_seqlens, max_seqlen, causal, window or 0, softcap or 0.0, scale)
    if isinstance(plan, Mapping):
        plan = plan.get(window)
    if plan is not None:
        _check_plan(plan, q, causal, window)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    tiles, header = (None, ()) if plan is None or engine == "torch" else (plan.data, plan.header)
    if engine == "hopper" and _may_fuse(q.shape[2], softcap, deterministic):
        engine = "hopper-fused"
    out, lse = attention_forward(q, k, v, cu_seqlens, tiles, header, causal, window or 0, softcap or 0.0, scale, engine)
    if sinks is not None:
        # softmax with one more column of value 0: out shrinks by exp(lse) / (exp(lse) + exp(sink))
        sink = sinks.to(lse.dtype)[:, None]
        inside = lse != -math.inf
        out = out * torch.where(inside, torch.sigmoid(lse - sink), 0.0).t()[..., None].to(out.dtype)
        lse = torch.where(inside, torch.logaddexp(lse, sink), lse)
    return (out, lse) if return_lse else out


def _may_fuse(head_dim: int, softcap: float | None, deterministic: bool | None) -> bool:
    """Whether the Hopper tier takes its fused backward; a soft-cap at 128 channels does not fit into its registers."""
    asked = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    return not asked and (softcap is None or head_dim <= 64)


def _check_plan(plan: DevicePlan, q: Tensor, causal: bool, window: int | None) -> None:
    if (plan.tokens, plan.causal, plan.window) != (q.shape[0], causal, window or 0):
        raise ValueError(
            f"attention: the plan was made for T={plan.tokens}, causal={plan.causal}, window={plan.window or None}; this call "
            f"has T={q.shape[0]}, causal={causal}, window={window}. Make it with plan_attention(...) for this call."
        )


def _library(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    T = q.shape[0]
    if engine == "flex":
        return library.flex_attention(q, k, v, document_ids(cu_seqlens, T, q.device), causal, window, softcap, scale)
    longest = T if max_seqlen is None else max_seqlen
    if engine == "sdpa":
        return library.sdpa_attention(q, k, v, cu_seqlens, longest, causal, window, scale)
    bounds = torch.tensor([0, T], dtype=torch.int32, device=q.device) if cu_seqlens is None else cu_seqlens
    return library.flash_attention(q, k, v, bounds, longest, causal, window, softcap, scale)
