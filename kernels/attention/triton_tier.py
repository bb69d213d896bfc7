"""Packed attention in portable Triton: Ampere, Ada, Hopper, Blackwell; forward, delta, dk and dv, dq.

    S = scale * q k^T, capped;  P = exp(S - lse);  dP = dout v^T;  dS = P * (dP - delta) * cap'
    dv = P^T dout;  dk = scale * dS^T q;  dq = scale * dS k;      delta = sum(dout * out) - dlse

One program takes one tile of the tile map (tile_map.py) and one head: the steps in which every pair is seen run without a mask,
the few at documents' edges and on the diagonal with one. What a row sees is one interval, whatever the rule: causality, windows
and documents live in the tile map, and one build serves them all. The backward is split in two kernels, so nothing is added
atomically: runs are bitwise equal, at the cost of 7 matrix products instead of 5. Exponentials are base 2, scale folded
in; statistics and accumulators are fp32. Tile rows are placed by 64-bit offsets.

Row strides are compile-time constants: one build per model layout, and 30 registers less in dk and dv at D = 128.

Imports triton: operators.py imports this module only where dispatch chose it.
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
from ..launch import launch
from ..tensors import cdiv, with_adjacent_columns
from .rules import Rules
from .tile_map import TileMap
from .tiles import TileConfig, padded
from .triton_parts import LN2_, LOG2E_, NEVER, cap_slope, capped, load_tile, seen, store_tile, strides_of, tile_row


@triton.jit
def _forward_step(
    acc, total, top, q, k_base, v_base, n, k_row: tl.constexpr, v_row: tl.constexpr, first, last, high,
    scale2, cap2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key step of the online softmax."""
    at = tl.arange(0, BLOCK_N)
    inside = n + at < high
    k = load_tile(k_base + n.to(tl.int64) * k_row, at, k_row, inside, D, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_CAP:
        scores = capped(scores * scale2, cap2, HAS_CAP)
        factor = 1.0
    else:  # the top of the scores as they come, scaled in the exponential's own multiply-add: one instruction less per score
        factor = scale2
    if MASKED:
        scores = tl.where(seen(at[None, :], (first - n)[:, None], (last - n)[:, None]), scores, NEVER)
    new_top = tl.maximum(top, tl.max(scores, 1))
    offset = new_top * factor
    if MASKED:  # nothing seen yet: NEVER * factor + (-offset) would be the rounding of 1e30, not 0
        offset = tl.where(new_top == NEVER, 0.0, offset)
    p = tl.math.exp2(scores * factor - offset[:, None])
    shrink = tl.math.exp2((top - new_top) * factor)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = load_tile(v_base + n.to(tl.int64) * v_row, at, v_row, inside, DV, BLOCK_DV, MASKED)
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
    start, end, low, high, lead, full, tail = tile_row(TILES, tile)
    at = tl.arange(0, BLOCK_M)
    rows = start + at
    inside = rows < end
    first = tl.load(BOUNDS + rows, mask=inside, other=0)
    last = tl.load(BOUNDS + T + rows, mask=inside, other=0)
    q_base = Q + start.to(tl.int64) * q_row + head.to(tl.int64) * q_head
    q = load_tile(q_base, at, q_row, inside, D, BLOCK_D, True)
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
    store_tile(out_base, at, o_row, inside, acc, DV, BLOCK_DV)


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
def _key_step(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, m, q_row: tl.constexpr, do_row: tl.constexpr, first, last,
    high, scale2, cap2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query step of dk and dv; scores are transposed, (keys, queries). Rows from `high` on have P = exp2(-inf) = 0."""
    at = tl.arange(0, BLOCK_M)
    rows = m + at
    inside = rows < high
    wide = m.to(tl.int64)
    q = load_tile(q_base + wide * q_row, at, q_row, inside, D, BLOCK_D, True)
    lse2 = tl.load(lse_base + rows, mask=inside, other=float("inf")) * LOG2E_
    scores = capped(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2, cap2, HAS_CAP)
    p = tl.math.exp2(scores - lse2[None, :])
    if MASKED:
        p = tl.where(seen(at[None, :], (first - m)[:, None], (last - m)[:, None]), p, 0.0)
    do = load_tile(do_base + wide * do_row, at, do_row, inside, DV, BLOCK_DV, True)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    delta = tl.load(delta_base + rows, mask=inside, other=0.0)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :]) * cap_slope(scores, cap2, HAS_CAP)
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
    start, end, low, high, lead, full, tail = tile_row(TILES, tile)
    at = tl.arange(0, BLOCK_N)
    keys = start + at
    inside = keys < end
    first = tl.load(BOUNDS + 2 * T + keys, mask=inside, other=0)
    last = tl.load(BOUNDS + 3 * T + keys, mask=inside, other=0)
    wide_start, wide_head = start.to(tl.int64), kv_head.to(tl.int64)
    k = load_tile(K + wide_start * k_row + wide_head * k_head, at, k_row, inside, D, BLOCK_D, True)
    v = load_tile(V + wide_start * v_row + wide_head * v_head, at, v_row, inside, DV, BLOCK_DV, True)
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
    store_tile(DK + wide_start * dk_row + wide_head * dk_head, at, dk_row, inside, dk * scale, D, BLOCK_D)
    store_tile(DV_OUT + wide_start * dv_row + wide_head * dv_head, at, dv_row, inside, dv, DV, BLOCK_DV)


@triton.jit
def _query_step(
    dq, q, do, lse2, delta, k_base, v_base, n, k_row: tl.constexpr, v_row: tl.constexpr, first, last, high, scale2, cap2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key step of dq."""
    at = tl.arange(0, BLOCK_N)
    inside = n + at < high
    wide = n.to(tl.int64)
    k = load_tile(k_base + wide * k_row, at, k_row, inside, D, BLOCK_D, MASKED)
    v = load_tile(v_base + wide * v_row, at, v_row, inside, DV, BLOCK_DV, MASKED)
    scores = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2, cap2, HAS_CAP)
    p = tl.math.exp2(scores - lse2[:, None])
    if MASKED:
        p = tl.where(seen(at[None, :], (first - n)[:, None], (last - n)[:, None]), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None]) * cap_slope(scores, cap2, HAS_CAP)
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
    start, end, low, high, lead, full, tail = tile_row(TILES, tile)
    at = tl.arange(0, BLOCK_M)
    rows = start + at
    inside = rows < end
    first = tl.load(BOUNDS + rows, mask=inside, other=0)
    last = tl.load(BOUNDS + T + rows, mask=inside, other=0)
    wide_start, wide_head, kv_head = start.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    q = load_tile(Q + wide_start * q_row + wide_head * q_head, at, q_row, inside, D, BLOCK_D, True)
    do = load_tile(DOUT + wide_start * do_row + wide_head * do_head, at, do_row, inside, DV, BLOCK_DV, True)
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
    store_tile(DQ + wide_start * dq_row + wide_head * dq_head, at, dq_row, inside, dq * scale, D, BLOCK_D)


def _constants(q: Tensor, v: Tensor, rules: Rules) -> dict[str, Any]:
    """Constants that all kernels take."""
    D, DV = q.shape[2], v.shape[2]
    return {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV),
        "HAS_CAP": rules.softcap > 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _blocks(config: TileConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@on_its_device
def attention_forward_triton(q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap, rules: Rules) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) in q's dtype and lse (Hq, T) fp32."""
    q, k, v = (with_adjacent_columns(x) for x in (q, k, v))
    T, heads, _ = q.shape
    out, lse = q.new_empty(T, heads, v.shape[2]), q.new_empty(heads, T, dtype=torch.float32)
    constants = _constants(q, v, rules)
    tiles = tile_map.forward
    launch(attention_forward_kernel, (tiles.shape[0] * heads,),
        q, k, v, out, lse, tiles, tile_map.bounds, T, heads, heads // k.shape[1], *rules.base2,
        *strides_of(q, k, v, out), **constants, **_blocks(tile_map.config.forward),
    )  # fmt: skip
    return out, lse


@on_its_device
def attention_backward_triton(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    tile_map: TileMap, rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dense, in the dtypes of q, k and v."""
    q, k, v, out, dout = (with_adjacent_columns(x) for x in (q, k, v, out, dout))
    T, heads, _ = q.shape
    kv_heads = k.shape[1]
    delta = torch.empty_like(lse)
    constants = _constants(q, v, rules)
    launch(attention_delta_kernel, (cdiv(T, 64) * heads,),
        out, dout, lse if dlse is None else dlse.contiguous(), delta, T, heads, *strides_of(out, dout),
        DV=constants["DV"], BLOCK_DV=constants["BLOCK_DV"], BLOCK_M=64, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tiles, bounds = tile_map.dkdv, tile_map.bounds
    launch(attention_dkdv_kernel, (tiles.shape[0] * kv_heads,),
        q, k, v, dout, lse, delta, dk, dv, tiles, bounds, T, kv_heads, heads // kv_heads, rules.scale,
        *rules.base2, *strides_of(q, k, v, dout, dk, dv), **constants, **_blocks(tile_map.config.dkdv),
    )  # fmt: skip
    tiles = tile_map.dq
    launch(attention_dq_kernel, (tiles.shape[0] * heads,),
        q, k, v, dout, lse, delta, dq, tiles, bounds, T, heads, heads // kv_heads, rules.scale, *rules.base2,
        *strides_of(q, k, v, dout, dq), **constants, **_blocks(tile_map.config.dq),
    )  # fmt: skip
    return dq, dk, dv
