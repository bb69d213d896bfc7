# mypy: disable-error-code="no-untyped-def"
"""Forward of packed attention for Hopper: TMA descriptors, warp-specialised by the compiler; backward of the portable tier.

One producer warp group feeds K and V tiles by TMA, the others compute (setmaxnreg in the binary; the cross-compilation gate
reads it). What the compiler needs for that, found by compiling: ONE loop over the steps, so every step is masked by `where` (a
second loop trips triton issue 9728, an `if` around the mask silently drops the specialisation), four warps, and a mask made of
scalars alone; so its query tiles hold one document each (plan_attention(..., impl="hopper")).

Interpreted and cross-compiled only; never timed on a GPU. Dispatch does not choose it by itself: set impl="hopper" to try it.
Takes bf16 and fp16, D = Dv = 64 or 128, causal, no soft-cap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chatmill.kernels.attention_config import DevicePlan
from chatmill.kernels.attention_triton import LN2_, LOG2E, NEVER, _dense_channels, _seen, _strides

# by head dimension: largest query tile (rows), keys per step, warps of a compute group, pipeline stages
TILES_BY_DIM = {64: (128, 128, 4, 2), 128: (128, 128, 4, 2)}


@triton.jit
def attention_forward_hopper_kernel(
    Q, K, V, OUT, LSE, TILES, T, heads, group, reach, scale2, q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    """out (T, Hq, D) and lse (Hq, T) of one query tile and head."""
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(TILES + tile * 8)
    end = tl.load(TILES + tile * 8 + 1)
    low = tl.load(TILES + tile * 8 + 2)
    high = tl.load(TILES + tile * 8 + 3)
    at = tl.arange(0, BLOCK_M)
    rows = start + at
    inside = rows < end
    channel = tl.arange(0, D)
    # from numbers alone: a tensor loaded before the loop and used in it stops the specialising pass
    first = tl.maximum(low, rows - reach + 1)
    count = tl.minimum(rows + 1, high) - first
    # made here and not by the host: the compiler halves the query block, one half per compute group
    wide_head, kv_head = head.to(tl.int64), (head // group).to(tl.int64)
    q_desc = tl.make_tensor_descriptor(Q + wide_head * q_head, [T, D], [q_row, 1], [BLOCK_M, D])
    k_desc = tl.make_tensor_descriptor(K + kv_head * k_head, [T, D], [k_row, 1], [BLOCK_N, D])
    v_desc = tl.make_tensor_descriptor(V + kv_head * v_head, [T, D], [v_row, 1], [BLOCK_N, D])
    q = q_desc.load([start, 0])
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NEVER, tl.float32)
    for n in tl.range(low, high, BLOCK_N, warp_specialize=SPECIALISE):
        k = k_desc.load([n, 0])
        scores = tl.dot(q, tl.trans(k)) * scale2
        keys = n + tl.arange(0, BLOCK_N)
        scores = tl.where(_seen(keys[None, :], first[:, None], count[:, None]), scores, NEVER)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.math.exp2(scores - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = v_desc.load([n, 0])
        acc = tl.dot(p.to(v.dtype), v, acc)
        top = new_top
    some = total > 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (top + tl.math.log2(tl.where(some, total, 1.0))) * LN2_, float("-inf"))
    tl.store(LSE + wide_head * T + rows, lse, mask=inside)
    out_base = OUT + start.to(tl.int64) * o_row + wide_head * o_head
    tl.store(out_base + at[:, None] * o_row + channel[None, :], acc.to(OUT.dtype.element_ty), mask=inside[:, None])


def why_not_hopper(dtype: torch.dtype, head_dim: int, value_dim: int, softcap: float, causal: bool) -> str | None:
    """Why this tier cannot do a call; None where it can."""
    if not causal:
        return "the Hopper tier is causal"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper tier takes bf16 and fp16, not {dtype}"
    if head_dim != value_dim or head_dim not in TILES_BY_DIM:
        return f"the Hopper tier takes head dimensions {sorted(TILES_BY_DIM)}, not {head_dim} and {value_dim}"
    return "the Hopper tier has no soft-cap" if softcap else None


def attention_forward_hopper(
    q: Tensor, k: Tensor, v: Tensor, plan: DevicePlan, scale: float, specialise: bool = True
) -> tuple[Tensor, Tensor]:
    """out (T, Hq, D) in q's dtype and lse (Hq, T) fp32."""
    T, heads, D = q.shape
    q, k, v = (_aligned(x) for x in (q, k, v))
    block_m, block_n, num_warps, num_stages = TILES_BY_DIM[D]
    if plan.shared or plan.config.forward.block_m > block_m:
        raise ValueError('attention: this plan is not for the Hopper tier: make it with plan_attention(..., impl="hopper").')
    out, lse = q.new_empty(T, heads, D), q.new_empty(heads, T, dtype=torch.float32)
    triton.set_allocator(_descriptor_memory)
    attention_forward_hopper_kernel[(plan.forward.shape[0] * heads,)](
        q, k, v, out, lse, plan.forward, T, heads, heads // k.shape[1], plan.window or T, scale * LOG2E,
        *_strides(q, k, v, out),
        D=D, BLOCK_M=block_m, BLOCK_N=block_n, SPECIALISE=specialise, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse


def _aligned(x: Tensor) -> Tensor:
    """TMA wants rows and heads that start at multiples of 16 bytes."""
    x = _dense_channels(x)
    size = x.element_size()
    return x if all(n % 16 == 0 for n in (x.data_ptr(), x.stride(0) * size, x.stride(1) * size)) else x.contiguous()


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """Scratch memory where the kernel writes its descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
