# mypy: disable-error-code="no-untyped-def"
"""Split-K decoding kernels of decode.py: stretches of the cache, then their merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_its_device
from ..launch import launch
from ..tensors import cdiv, with_adjacent_columns
from .rules import Rules
from .tiles import padded
from .triton_parts import NEVER, capped

BLOCK_N = 64
# programs that fill the largest GPU of today about twice
WANTED_PROGRAMS = 264


@triton.jit
def attention_decode_stretch_kernel(
    Q, K, V, PART, TOP, TOTAL, LENGTHS, splits, kv_heads, group, window, scale2, cap2,
    q_batch, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch of one conversation and key head. PART (B, Hq, splits, Dv), TOP and TOTAL (B, Hq, splits), all fp32."""
    program = tl.program_id(0)
    split, kv_head, batch = program % splits, program // splits % kv_heads, (program // (splits * kv_heads)).to(tl.int64)
    length = tl.load(LENGTHS + batch)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0)
    # stretches of whole blocks, as even as that allows
    blocks = tl.cdiv(length - begin, BLOCK_N)
    low = begin + (blocks * split // splits) * BLOCK_N
    high = tl.minimum(begin + (blocks * (split + 1) // splits) * BLOCK_N, length)
    g = tl.arange(0, BLOCK_G)
    at = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    value_channel = tl.arange(0, BLOCK_DV)
    heads = kv_head * group + g
    real = g < group
    q = tl.load(
        Q + batch * q_batch + heads[:, None] * q_head + channel[None, :], mask=real[:, None] & (channel[None, :] < D), other=0.0
    )
    k_base = K + batch * k_batch + kv_head.to(tl.int64) * k_head
    v_base = V + batch * v_batch + kv_head.to(tl.int64) * v_head
    top = tl.full([BLOCK_G], NEVER, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for n in tl.range(low, high, BLOCK_N):
        inside = n + at < high
        rows = (n + at).to(tl.int64)
        k = tl.load(k_base + rows[:, None] * k_row + channel[None, :], mask=inside[:, None] & (channel[None, :] < D), other=0.0)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2, cap2, HAS_CAP)
        scores = tl.where(inside[None, :], scores, NEVER)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.math.exp2(scores - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(
            v_base + rows[:, None] * v_row + value_channel[None, :],
            mask=inside[:, None] & (value_channel[None, :] < DV),
            other=0.0,
        )
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    place = (batch * kv_heads * group + heads) * splits + split
    tl.store(TOP + place, top, mask=real)
    tl.store(TOTAL + place, total, mask=real)
    tl.store(PART + place[:, None] * DV + value_channel[None, :], acc, mask=real[:, None] & (value_channel[None, :] < DV))


@triton.jit
def attention_decode_merge_kernel(
    PART, TOP, TOTAL, OUT, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr
):
    """out (B, Hq, Dv) of one conversation and head from its stretches."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_DV)
    real = s < splits
    top = tl.load(TOP + row * splits + s, mask=real, other=-1.0e30)
    total = tl.load(TOTAL + row * splits + s, mask=real, other=0.0)
    weight = tl.math.exp2(top - tl.max(top, 0))
    weight = tl.where(real, weight, 0.0)
    part = tl.load(
        PART + (row * splits + s)[:, None] * DV + channel[None, :], mask=real[:, None] & (channel[None, :] < DV), other=0.0
    )
    out = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(OUT + row * DV + channel, out.to(OUT.dtype.element_ty), mask=channel < DV)


def tile(D: int, DV: int, element_bytes: int) -> tuple[int, int]:
    """Keys of a step and pipeline depth that the 99 KB of shared memory of the smallest generations (8.6, 8.9, 12) hold."""
    if max(D, DV) <= 128:
        return BLOCK_N, 3 if element_bytes <= 2 else 2
    return (BLOCK_N, 2) if element_bytes <= 2 else (16, 2)


@on_its_device
def decode_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, rules: Rules, splits: int | None
) -> Tensor:
    """out (B, Hq, Dv)."""
    q, k_cache, v_cache = (with_adjacent_columns(x) for x in (q, k_cache, v_cache))
    B, heads, D = q.shape
    C, kv_heads, DV = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    block_n, num_stages = tile(D, DV, q.element_size())
    if splits is None:
        splits = max(1, min(cdiv(C, 2 * block_n), WANTED_PROGRAMS // (B * kv_heads), 128))
    part = q.new_empty(B, heads, splits, DV, dtype=torch.float32)
    top, total = (q.new_empty(B, heads, splits, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(B, heads, DV)
    launch(attention_decode_stretch_kernel, (B * kv_heads * splits,),
        q, k_cache, v_cache, part, top, total, lengths.to(device=q.device, dtype=torch.int32), splits, kv_heads,
        heads // kv_heads,
        rules.window, *rules.base2, *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        D=D, DV=DV, BLOCK_D=padded(D), BLOCK_DV=padded(DV), BLOCK_G=padded(heads // kv_heads), BLOCK_N=block_n,
        HAS_WINDOW=rules.window > 0, HAS_CAP=rules.softcap > 0, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=num_stages,
    )  # fmt: skip
    launch(
        attention_decode_merge_kernel,
        (B * heads,),
        part,
        top,
        total,
        out,
        splits,
        DV=DV,
        BLOCK_DV=padded(DV),
        BLOCK_S=max(2, 1 << (splits - 1).bit_length()),
        num_warps=4,
    )
    return out
