"""Packed attention in portable Triton: Ampere, Ada, Hopper, Blackwell; forward, delta, dk and dv, dq.

    S = scale * q k^T, capped;  P = exp(S - lse);  dP = dout v^T;  dS = P * (dP - delta) * cap'
    dv = P^T dout;  dk = scale * dS^T q;  dq = scale * dS k;      delta = sum(dout * out) - dlse

One program takes one tile of a plan (attention_plan.py) and one head: the steps in which every pair is seen run without a mask,
the few at documents' edges and on the diagonal with one. What a row sees is one interval, whatever the rule: causality, windows
and documents live in the plan, and one build serves them all. The backward is split in two kernels, so nothing is added
atomically: runs are bitwise equal, at the price of 7 matrix products instead of 5. Exponentials are base 2, scale folded
in; statistics and accumulators are fp32. Tile rows are placed by 64-bit offsets.

Row strides are compile-time constants: one build per model layout, and 30 registers less in dk and dv at D = 128.

Imports triton: `attention.py` imports this module only where dispatch chose it.
Bench: python -m chatmill.kernels.bench attention
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_its_device
from .device_plan import DevicePlan, TileConfig, padded

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
LOG2E_ = tl.constexpr(LOG2E)
LN2_ = tl.constexpr(LN2)
# finite, so that NEVER - NEVER is no NaN: the top of a row that has seen nothing yet
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def _load_tile(base, offsets, inside, channel, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a tile, zero where a row is outside (MASKED) or a channel is padding."""
    if MASKED:
        if D == BLOCK_D:
            return tl.load(base + offsets, mask=inside[:, None], other=0.0)
        else:
            return tl.load(base + offsets, mask=inside[:, None] & (channel[None, :] < D), other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(base + offsets)
        else:
            return tl.load(base + offsets, mask=channel[None, :] < D, other=0.0)


@triton.jit
def _capped(scores, cap2, HAS_CAP: tl.constexpr):
    """Base-2 scores after the soft-cap: cap2 * tanh(scores / cap2); tanh by exp2, which every backend has."""
    if HAS_CAP:
        return cap2 * (1.0 - 2.0 / (1.0 + tl.math.exp2(scores * (2.0 * LOG2E_ / cap2))))
    else:
        return scores


@triton.jit
def _seen(at, first, last):
    """Whether rows `at` of a step lie in [first, last), both counted from the step's start; operands broadcast.

    So the sums are made per row, not per element: two comparisons with constants cost less than a difference and one.
    """
    return (at >= first) & (at < last)


@triton.jit
def _forward_step(
    acc, total, top, q, k_base, v_base, n, key_stride: tl.constexpr, value_stride: tl.constexpr, first, last, high,
    scale2, cap2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key step of the online softmax."""
    at = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    inside = n + at < high
    k = _load_tile(
        k_base + n.to(tl.int64) * key_stride, at[:, None] * key_stride + channel[None, :], inside, channel, D, BLOCK_D, MASKED
    )
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_CAP:
        scores = _capped(scores * scale2, cap2, HAS_CAP)
        factor = 1.0
    else:  # the top of the scores as they come, scaled in the exponential's own multiply-add: one instruction less per score
        factor = scale2
    if MASKED:
        scores = tl.where(_seen(at[None, :], (first - n)[:, None], (last - n)[:, None]), scores, NEVER)
    new_top = tl.maximum(top, tl.max(scores, 1))
    offset = new_top * factor
    if MASKED:  # nothing seen yet: NEVER * factor + (-offset) would be the rounding of 1e30, not 0
        offset = tl.where(new_top == NEVER, 0.0, offset)
    p = tl.math.exp2(scores * factor - offset[:, None])
    shrink = tl.math.exp2((top - new_top) * factor)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = _load_tile(
        v_base + n.to(tl.int64) * value_stride, at[:, None] * value_stride + value_channel[None, :], inside, value_channel,
        DV, BLOCK_DV, MASKED,
    )  # fmt: skip
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def attention_forward_kernel(
    Q, K, V, OUT, LSE, TILES, BOUNDS, T, heads, group, scale2, cap2,
    q_row: tl.constexpr, q_head, k_row: tl.constexpr, k_head, v_row: tl.constexpr, v_head, o_row: tl.constexpr, o_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (T, Hq, Dv) and lse (Hq, T) of one query tile and head. scale2: scale * log2(e); cap2: softcap * log2(e)."""
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(TILES + tile * 8)
    end = tl.load(TILES + tile * 8 + 1)
    low = tl.load(TILES + tile * 8 + 2)
    high = tl.load(TILES + tile * 8 + 3)
    lead = tl.load(TILES + tile * 8 + 4)
    full = tl.load(TILES + tile * 8 + 5)
    tail = tl.load(TILES + tile * 8 + 6)
    at = tl.arange(0, BLOCK_M)
    rows = start + at
    inside = rows < end
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    first = tl.load(BOUNDS + rows, mask=inside, other=0)
    last = tl.load(BOUNDS + T + rows, mask=inside, other=0)
    q_base = Q + start.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    q = _load_tile(q_base, at[:, None] * q_row + channel[None, :], inside, channel, D, BLOCK_D, True)
    k_base = K + (head // group).to(tl.int64) * k_head
    v_base = V + (head // group).to(tl.int64) * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NEVER, tl.float32)
    for i in tl.range(0, full):
        acc, total, top = _forward_step(
            acc, total, top, q, k_base, v_base, low + (lead + i) * BLOCK_N, k_row, v_row, first, last, high, scale2, cap2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_CAP, False, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, lead + tail):
        step = tl.where(i < lead, i, i + full)
        acc, total, top = _forward_step(
            acc, total, top, q, k_base, v_base, low + step * BLOCK_N, k_row, v_row, first, last, high, scale2, cap2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_CAP, True, PRECISION,
        )  # fmt: skip
    some = total > 0.0  # no step at all: a row of no document
    acc = acc / tl.where(some, total, 1.0)[:, None]
    factor = 1.0 if HAS_CAP else scale2
    lse = tl.where(some, (top * factor + tl.math.log2(tl.where(some, total, 1.0))) * LN2_, float("-inf"))
    tl.store(LSE + head.to(tl.int64) * T + rows, lse, mask=inside)
    out_base = OUT + start.to(tl.int64) * o_row + head.to(tl.int64) * o_head
    keep = inside[:, None] & (value_channel[None, :] < DV)
    tl.store(out_base + at[:, None] * o_row + value_channel[None, :], acc.to(OUT.dtype.element_ty), mask=keep)


@triton.jit
def attention_delta_kernel(
    OUT, DOUT, DLSE, DELTA, T, heads, o_row, o_head, do_row, do_head,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta (Hq, T) = sum over channels of dout * out, minus dlse."""
    block, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_DV)
    keep = (rows < T)[:, None] & (channel[None, :] < DV)
    wide = rows.to(tl.int64)[:, None]
    head = head.to(tl.int64)
    out = tl.load(OUT + wide * o_row + head * o_head + channel[None, :], mask=keep, other=0.0).to(tl.float32)
    dout = tl.load(DOUT + wide * do_row + head * do_head + channel[None, :], mask=keep, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        delta -= tl.load(DLSE + head * T + rows, mask=rows < T, other=0.0)
    tl.store(DELTA + head * T + rows, delta, mask=rows < T)


@triton.jit
def _cap_slope(scores, cap2, HAS_CAP: tl.constexpr):
    """Derivative of the soft-cap at its capped value."""
    if HAS_CAP:
        return 1.0 - (scores / cap2) * (scores / cap2)
    else:
        return 1.0


@triton.jit
def _key_step(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, m, q_row: tl.constexpr, do_row: tl.constexpr, first, last,
    high, scale2, cap2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query step of dk and dv; scores are transposed, (keys, queries). Rows from `high` on have P = exp2(-inf) = 0."""
    at = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    rows = m + at
    inside = rows < high
    wide = m.to(tl.int64)
    q = _load_tile(q_base + wide * q_row, at[:, None] * q_row + channel[None, :], inside, channel, D, BLOCK_D, True)
    lse2 = tl.load(lse_base + rows, mask=inside, other=float("inf")) * LOG2E_
    scores = _capped(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2, cap2, HAS_CAP)
    p = tl.math.exp2(scores - lse2[None, :])
    if MASKED:
        p = tl.where(_seen(at[None, :], (first - m)[:, None], (last - m)[:, None]), p, 0.0)
    do = _load_tile(
        do_base + wide * do_row, at[:, None] * do_row + value_channel[None, :], inside, value_channel, DV, BLOCK_DV, True
    )
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    delta = tl.load(delta_base + rows, mask=inside, other=0.0)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :]) * _cap_slope(scores, cap2, HAS_CAP)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV_OUT, TILES, BOUNDS, T, kv_heads, group, scale, scale2, cap2,
    q_row: tl.constexpr, q_head, k_row: tl.constexpr, k_head, v_row: tl.constexpr, v_head, do_row: tl.constexpr, do_head,
    dk_row: tl.constexpr, dk_head, dv_row: tl.constexpr, dv_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile and key head, summed over its query heads in a fixed order."""
    tile, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    start = tl.load(TILES + tile * 8)
    end = tl.load(TILES + tile * 8 + 1)
    low = tl.load(TILES + tile * 8 + 2)
    high = tl.load(TILES + tile * 8 + 3)
    lead = tl.load(TILES + tile * 8 + 4)
    full = tl.load(TILES + tile * 8 + 5)
    tail = tl.load(TILES + tile * 8 + 6)
    at = tl.arange(0, BLOCK_N)
    keys = start + at
    inside = keys < end
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    first = tl.load(BOUNDS + 2 * T + keys, mask=inside, other=0)
    last = tl.load(BOUNDS + 3 * T + keys, mask=inside, other=0)
    wide_start, wide_head = start.to(tl.int64), kv_head.to(tl.int64)
    k = _load_tile(
        K + wide_start * k_row + wide_head * k_head, at[:, None] * k_row + channel[None, :], inside, channel, D, BLOCK_D, True
    )
    v = _load_tile(
        V + wide_start * v_row + wide_head * v_head, at[:, None] * v_row + value_channel[None, :], inside, value_channel,
        DV, BLOCK_DV, True,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # heads and steps in one loop, so that the loads of the next head overlap the last step of this one
    for i in tl.range(0, full * group):
        head = (kv_head * group + i // full).to(tl.int64)
        m = low + (lead + i % full) * BLOCK_M
        dk, dv = _key_step(
            dk, dv, k, v, Q + head * q_head, DOUT + head * do_head, LSE + head * T, DELTA + head * T, m, q_row, do_row,
            first, last, high, scale2, cap2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, HAS_CAP, False, PRECISION,
        )  # fmt: skip
    masked = lead + tail
    for i in tl.range(0, masked * group):
        head = (kv_head * group + i // masked).to(tl.int64)
        step = i % masked
        m = low + tl.where(step < lead, step, step + full) * BLOCK_M
        dk, dv = _key_step(
            dk, dv, k, v, Q + head * q_head, DOUT + head * do_head, LSE + head * T, DELTA + head * T, m, q_row, do_row,
            first, last, high, scale2, cap2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, HAS_CAP, True, PRECISION,
        )  # fmt: skip
    dk_base = DK + wide_start * dk_row + wide_head * dk_head
    tl.store(
        dk_base + at[:, None] * dk_row + channel[None, :],
        (dk * scale).to(DK.dtype.element_ty),
        mask=inside[:, None] & (channel[None, :] < D),
    )
    dv_base = DV_OUT + wide_start * dv_row + wide_head * dv_head
    tl.store(
        dv_base + at[:, None] * dv_row + value_channel[None, :],
        dv.to(DV_OUT.dtype.element_ty),
        mask=inside[:, None] & (value_channel[None, :] < DV),
    )


@triton.jit
def _query_step(
    dq, q, do, lse2, delta, k_base, v_base, n, k_row: tl.constexpr, v_row: tl.constexpr, first, last, high, scale2, cap2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key step of dq."""
    at = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    inside = n + at < high
    wide = n.to(tl.int64)
    k = _load_tile(k_base + wide * k_row, at[:, None] * k_row + channel[None, :], inside, channel, D, BLOCK_D, MASKED)
    v = _load_tile(
        v_base + wide * v_row, at[:, None] * v_row + value_channel[None, :], inside, value_channel, DV, BLOCK_DV, MASKED
    )
    scores = _capped(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2, cap2, HAS_CAP)
    p = tl.math.exp2(scores - lse2[:, None])
    if MASKED:
        p = tl.where(_seen(at[None, :], (first - n)[:, None], (last - n)[:, None]), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None]) * _cap_slope(scores, cap2, HAS_CAP)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def attention_dq_kernel(
    Q, K, V, DOUT, LSE, DELTA, DQ, TILES, BOUNDS, T, heads, group, scale, scale2, cap2,
    q_row: tl.constexpr, q_head, k_row: tl.constexpr, k_head, v_row: tl.constexpr, v_head, do_row: tl.constexpr, do_head,
    dq_row: tl.constexpr, dq_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one query tile and head."""
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(TILES + tile * 8)
    end = tl.load(TILES + tile * 8 + 1)
    low = tl.load(TILES + tile * 8 + 2)
    high = tl.load(TILES + tile * 8 + 3)
    lead = tl.load(TILES + tile * 8 + 4)
    full = tl.load(TILES + tile * 8 + 5)
    tail = tl.load(TILES + tile * 8 + 6)
    at = tl.arange(0, BLOCK_M)
    rows = start + at
    inside = rows < end
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    first = tl.load(BOUNDS + rows, mask=inside, other=0)
    last = tl.load(BOUNDS + T + rows, mask=inside, other=0)
    wide_start, wide_head, kv_head = start.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    q = _load_tile(
        Q + wide_start * q_row + wide_head * q_head, at[:, None] * q_row + channel[None, :], inside, channel, D, BLOCK_D, True
    )
    do = _load_tile(
        DOUT + wide_start * do_row + wide_head * do_head, at[:, None] * do_row + value_channel[None, :], inside, value_channel,
        DV, BLOCK_DV, True,
    )  # fmt: skip
    lse2 = tl.load(LSE + wide_head * T + rows, mask=inside, other=float("inf")) * LOG2E_
    delta = tl.load(DELTA + wide_head * T + rows, mask=inside, other=0.0)
    k_base, v_base = K + kv_head * k_head, V + kv_head * v_head
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(0, full):
        dq = _query_step(
            dq, q, do, lse2, delta, k_base, v_base, low + (lead + i) * BLOCK_N, k_row, v_row, first, last, high, scale2, cap2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_CAP, False, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, lead + tail):
        step = tl.where(i < lead, i, i + full)
        dq = _query_step(
            dq, q, do, lse2, delta, k_base, v_base, low + step * BLOCK_N, k_row, v_row, first, last, high, scale2, cap2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_CAP, True, PRECISION,
        )  # fmt: skip
    dq_base = DQ + wide_start * dq_row + wide_head * dq_head
    tl.store(
        dq_base + at[:, None] * dq_row + channel[None, :],
        (dq * scale).to(DQ.dtype.element_ty),
        mask=inside[:, None] & (channel[None, :] < D),
    )


def _strides(*tensors: Tensor) -> list[int]:
    """Row and head strides, in elements; channels are contiguous."""
    return [s for x in tensors for s in x.stride()[:2]]


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _shared(q: Tensor, v: Tensor, softcap: float, scale: float) -> tuple[list[Any], dict[str, Any]]:
    """scale2 and cap2; constants that all kernels take."""
    D, DV = q.shape[2], v.shape[2]
    constants = {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV),
        "HAS_CAP": softcap > 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return [scale * LOG2E, max(softcap, 1e-6) * LOG2E], constants


def _blocks(config: TileConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@on_its_device
def attention_forward_triton(
    q: Tensor, k: Tensor, v: Tensor, plan: DevicePlan, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) in q's dtype and lse (Hq, T) fp32."""
    q, k, v = (_dense_channels(x) for x in (q, k, v))
    T, heads, _ = q.shape
    out, lse = q.new_empty(T, heads, v.shape[2]), q.new_empty(heads, T, dtype=torch.float32)
    scales, constants = _shared(q, v, softcap, scale)
    attention_forward_kernel[(plan.forward.shape[0] * heads,)](
        q, k, v, out, lse, plan.forward, plan.bounds, T, heads, heads // k.shape[1], *scales,
        *_strides(q, k, v, out), **constants, **_blocks(plan.config.forward),
    )  # fmt: skip
    return out, lse


@on_its_device
def attention_backward_triton(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, plan: DevicePlan,
    softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dense, in the dtypes of q, k and v."""
    q, k, v, out, dout = (_dense_channels(x) for x in (q, k, v, out, dout))
    T, heads, _ = q.shape
    kv_heads = k.shape[1]
    delta = torch.empty_like(lse)
    scales, constants = _shared(q, v, softcap, scale)
    attention_delta_kernel[(triton.cdiv(T, 64) * heads,)](
        out, dout, lse if dlse is None else dlse.contiguous(), delta, T, heads, *_strides(out, dout),
        DV=constants["DV"], BLOCK_DV=constants["BLOCK_DV"], BLOCK_M=64, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    attention_dkdv_kernel[(plan.dkdv.shape[0] * kv_heads,)](
        q, k, v, dout, lse, delta, dk, dv, plan.dkdv, plan.bounds, T, kv_heads, heads // kv_heads, scale, *scales,
        *_strides(q, k, v, dout, dk, dv), **constants, **_blocks(plan.config.dkdv),
    )  # fmt: skip
    attention_dq_kernel[(plan.dq.shape[0] * heads,)](
        q, k, v, dout, lse, delta, dq, plan.dq, plan.bounds, T, heads, heads // kv_heads, scale, *scales,
        *_strides(q, k, v, dout, dq), **constants, **_blocks(plan.config.dq),
    )  # fmt: skip
    return dq, dk, dv
