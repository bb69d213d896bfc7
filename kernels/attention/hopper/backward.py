"""Backward of packed attention for Hopper in one kernel: five matrix products a step, dq added by TMA. Not deterministic.

    S = scale * q k^T, capped;  P = exp(S - lse);  dP = dout v^T;  dS = P * (dP - delta) * cap'
    dv += P^T dout;   dk += dS^T q;   dq += dS k  (fp32, in memory, by the TMA unit's reduction)

One program takes one key tile and one key head, and walks the queries that see it, head after head of its group. The split
kernels of triton_tier.py compute S and dP twice, so that no two programs add to one place: 7 products, bitwise equal runs.
Here programs add to dq as they get there: the fp32 sums differ in their last bits from run to run.

Its cost apart from the products, with n = T * Hq * D: 4n bytes written to zero the fp32 dq (in the pass that makes delta,
which reads those rows anyway), 4n bytes added into L2 per key tile that a query sees, 4n read and 2n written by the last pass,
which scales and rounds dq. With short documents (one or two key tiles per query) that is a large share of the time.

TMA tiles are whole blocks of rows, whichever document they belong to. So in a step at a document's edge, a window's edge or
the diagonal P and dS are set to zero outside what is seen, and 0.0 is added to rows of other documents; rows past T are cut off
by the hardware. (A NaN in another document's q, k or dout within such a block does get through: 0 * NaN.) Steps in which every
pair is seen skip the mask by a branch: one loop, since two of them need more registers than there are at D = 128.

Steps begin at multiples of 4 rows: TMA coordinates must be multiples of 16 bytes, and lse and delta are fp32.
Not warp-specialised: with the fifth product in the loop the compiler's partitioning pass fails (3.6.0 and 3.7.1, docs/log.md).
Interpreted and cross-compiled only; never timed on a GPU. Dispatch does not choose it by itself: set impl="hopper".
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...dispatch import on_its_device
from ...launch import launch
from ...tensors import cdiv, with_adjacent_columns
from ..rules import Rules
from ..tile_map import TileMap
from ..triton_parts import LOG2E_, cap_slope, capped, strides_of, tile_row

DIMS = (64, 128)
# rows of a pass over all rows
ROWS = 64
# elements of the last pass
FINISH_BLOCK = 2048
# lse and delta are read in blocks that start at multiples of this many rows
ALIGNED_ROWS = tl.constexpr(4)


@triton.jit
def attention_hopper_backward_prepare_kernel(
    OUT, DOUT, LSE, DLSE, LSE2, DELTA, DQ_SUM, T, heads, padded_T, o_row, o_head, do_row, do_head,
    D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = sum(dout * out) - dlse and lse2 = lse * log2(e), both (Hq, padded T); zeros in dq's sums (T, Hq, D)."""
    block, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < T
    channel = tl.arange(0, D)
    wide = rows.to(tl.int64)[:, None]
    out = tl.load(OUT + wide * o_row + head * o_head + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    dout = tl.load(DOUT + wide * do_row + head * do_head + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        delta -= tl.load(DLSE + head * T + rows, mask=inside, other=0.0)
    tl.store(DELTA + head * padded_T + rows, delta, mask=inside)
    tl.store(LSE2 + head * padded_T + rows, tl.load(LSE + head * T + rows, mask=inside, other=0.0) * LOG2E_, mask=inside)
    zeros = tl.zeros([BLOCK_M, D], tl.float32)
    tl.store(DQ_SUM + (wide * heads + head) * D + channel[None, :], zeros, mask=inside[:, None])


@triton.jit
def attention_hopper_backward_finish_kernel(DQ_SUM, DQ, count, scale, BLOCK: tl.constexpr):
    """dq = scale * its fp32 sums, rounded."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(DQ_SUM + at, mask=at < count, other=0.0)
    tl.store(DQ + at, (sums * scale).to(DQ.dtype.element_ty), mask=at < count)


@triton.jit
def _seen_once(row, first, count):
    """Whether a row number lies in [first, first + count), by one unsigned comparison: few registers are left here."""
    return (row - first).to(tl.uint32) < count.to(tl.uint32)


@triton.jit
def attention_backward_hopper_kernel(
    Q, K, V, DOUT, DQ_SUM, LSE2, DELTA, DK, DV, TILES, BOUNDS, T, kv_heads, group, q_head, k_head, v_head, do_head,
    scale, scale2, cap2, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """dk and dv (T, Hk, D) of one key tile and key head, and what its pairs add to dq_sum (T, Hq, D).

    Q, DOUT, DQ_SUM: descriptors of (T, Hq * D), blocks of (BLOCK_M, D). K, V: of (T, Hk * D), blocks of (BLOCK_N, D).
    LSE2, DELTA: of (Hq, T), blocks of (1, BLOCK_M). Scores are transposed: (keys, queries).
    """
    tile, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    start, end, low, high, lead, full, _ = tile_row(TILES, tile)
    at = tl.arange(0, BLOCK_N)
    inside = start + at < end
    first = tl.load(BOUNDS + 2 * T + start + at, mask=inside, other=0)
    count = tl.load(BOUNDS + 3 * T + start + at, mask=inside, other=0) - first
    k = K.load([start, kv_head * k_head])
    v = V.load([start, kv_head * v_head])
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    # steps from clear to before edge: every row sees every key of the tile. None where the tile is not whole
    clear = low + lead * BLOCK_M
    edge = tl.where(end - start == BLOCK_N, tl.minimum(clear + full * BLOCK_M, high) - BLOCK_M + 1, 0)
    begin = low // ALIGNED_ROWS * ALIGNED_ROWS
    m = begin
    head = kv_head * group
    # addresses kept over the loop would take the registers that 128 channels need: what is spilled then is read in every step
    WIDE: tl.constexpr = D > 64
    # heads and steps in one loop, so that the loads of the next head overlap the last step of this one
    for _ in tl.range(0, (high - begin + BLOCK_M - 1) // BLOCK_M * group, disable_licm=WIDE):
        q = Q.load([m, head * q_head])
        lse2 = LSE2.load([head, m]).reshape([BLOCK_M])
        scores = capped(tl.dot(k, q.T) * scale2, cap2, HAS_CAP)
        p = tl.math.exp2(scores - lse2[None, :])
        if (m < clear) | (m >= edge):
            p = tl.where(_seen_once((m + tl.arange(0, BLOCK_M))[None, :], first[:, None], count[:, None]), p, 0.0)
        do = DOUT.load([m, head * do_head])
        dv = tl.dot(p.to(do.dtype), do, dv)
        delta = DELTA.load([head, m]).reshape([BLOCK_M])
        ds = p * (tl.dot(v, do.T) - delta[None, :]) * cap_slope(scores, cap2, HAS_CAP)
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk)
        DQ_SUM.atomic_add([m, head * D], tl.dot(ds.T, k))
        m += BLOCK_M
        is_last = m >= high
        m = tl.where(is_last, begin, m)
        head += is_last.to(tl.int32)
    inside = start + tl.arange(0, BLOCK_N) < end
    base = (start.to(tl.int64) * kv_heads + kv_head) * D
    offsets = tl.arange(0, BLOCK_N)[:, None] * (kv_heads * D) + tl.arange(0, D)[None, :]
    tl.store(DK + base + offsets, (dk * scale).to(DK.dtype.element_ty), mask=inside[:, None])
    tl.store(DV + base + offsets, dv.to(DV.dtype.element_ty), mask=inside[:, None])


def launch_shape(D: int, block_n: int) -> tuple[int, int]:
    """Warps and pipeline stages of the kernel. With 2 stages a step's tiles would be asked for one step late."""
    return (4 if D == 64 and block_n <= 64 else 8), 3


@on_its_device
def attention_backward_hopper(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    tile_map: TileMap, rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dense. Takes bf16 and fp16, D = Dv = 64 or 128; key tiles are those of the split dk and dv kernel."""
    T, heads, D = q.shape
    kv_heads = k.shape[1]
    if v.shape[2] != D or D not in DIMS or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention: the fused backward takes bf16 and fp16, D = Dv in {DIMS}; got {q.dtype}, {D}, {v.shape[2]}. "
            'Take impl="triton", or deterministic=True.'
        )
    q, k, v, dout = (_rows_of_heads(x) for x in (q, k, v, dout))
    out = with_adjacent_columns(out)
    padded_T = -(-T // ALIGNED_ROWS.value) * ALIGNED_ROWS.value
    lse2, delta = (lse.new_empty(heads, padded_T) for _ in range(2))
    dq_sum = q.new_empty(T, heads, D, dtype=torch.float32)
    dq, dk, dv = q.new_empty(T, heads, D), k.new_empty(T, kv_heads, D), v.new_empty(T, kv_heads, D)
    if not T:  # a descriptor of no rows is refused by the driver
        return dq, dk, dv
    launch(attention_hopper_backward_prepare_kernel, (cdiv(T, ROWS) * heads,),
        out, dout, lse, lse if dlse is None else dlse.contiguous(), lse2, delta, dq_sum, T, heads, padded_T,
        *strides_of(out, dout), D=D, BLOCK_M=ROWS, HAS_DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    block_m, block_n = tile_map.config.dkdv[:2]
    num_warps, num_stages = launch_shape(D, block_n)
    launch(
        attention_backward_hopper_kernel,
        (tile_map.dkdv.shape[0] * kv_heads,),
        _columns(q, block_m), _columns(k, block_n), _columns(v, block_n), _columns(dout, block_m), _columns(dq_sum, block_m),
        _per_row(lse2, T, block_m), _per_row(delta, T, block_m), dk, dv, tile_map.dkdv, tile_map.bounds, T, kv_heads,
        heads // kv_heads, q.stride(1), k.stride(1), v.stride(1), dout.stride(1),
        rules.scale, *rules.base2,
        D=D, BLOCK_M=block_m, BLOCK_N=block_n, HAS_CAP=rules.softcap > 0, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    finish = (cdiv(dq.numel(), FINISH_BLOCK),)
    launch(
        attention_hopper_backward_finish_kernel, finish, dq_sum, dq, dq.numel(), rules.scale, BLOCK=FINISH_BLOCK, num_warps=4
    )
    return dq, dk, dv


def _rows_of_heads(x: Tensor) -> Tensor:
    """A row's heads side by side and rows at multiples of 16 bytes, as the descriptors want them: otherwise a copy."""
    size, (row, head, channel) = x.element_size(), x.stride()
    fits = channel == 1 and x.shape[2] <= head and head * (x.shape[1] - 1) + x.shape[2] <= row
    return x if fits and all(n % 16 == 0 for n in (x.data_ptr(), row * size, head * size)) else _copy(x)


def _copy(x: Tensor) -> Tensor:
    """A dense copy in memory of its own: contiguous() hands back a dense tensor that begins between multiples of 16 bytes."""
    return x.clone(memory_format=torch.contiguous_format)


def _columns(x: Tensor, block: int) -> TensorDescriptor:
    """Rows (T, heads and channels) in blocks of one head."""
    _, heads, D = x.shape
    return TensorDescriptor(x, [x.shape[0], (heads - 1) * x.stride(1) + D], [x.stride(0), 1], [block, D])


def _per_row(x: Tensor, T: int, block: int) -> TensorDescriptor:
    """Numbers (heads, T), in blocks of one head; what lies past T reads as 0."""
    return TensorDescriptor(x, [x.shape[0], T], [x.stride(0), 1], [1, block])
