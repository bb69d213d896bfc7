# mypy: disable-error-code="no-untyped-def"
"""Forward of packed attention for Hopper, in Gluon: TMA, warp-specialised, persistent, ping-pong; the backward is another tier.

    tile_map = make_tile_map(cu_seqlens, T, head_dim=128, impl="hopper").to("cuda")
    out, lse = attention_forward_hopper(q, k, v, tile_map, Rules(causal=True, window=0, softcap=0.0, scale=128**-0.5))

One program per multiprocessor walks the tiles x heads, longest first. One warp loads by TMA, two groups of four warps hold 64
query rows each (setmaxnreg gives them the loader's registers). A group issues Q K(i)^T and P(i-1) V(i-1) together, hands the
tensor cores to the other group and does its softmax meanwhile. Rings and phases run on from tile to tile, so that the next
tile's keys are on their way while this one is stored. Steps in which every pair is seen run without a mask; the few others go
first. What a row sees is the tile map's interval [first, last), so a tile may hold several documents.

Barriers (shared memory mbarriers; n counts key steps and t tiles of this program, s = n mod STAGES, c = group 0 or 1):

    barrier      completed by                                  waited for by                        phase
    q_full[c]    TMA: 64 query rows have landed                group c, before its first Q K^T      t
    q_empty[c]   group c, after its last Q K^T of a tile       loader, before the next tile's rows  t - 1
    k_full[s]    TMA: one block of keys has landed             both groups, before Q K^T            n div STAGES
    k_empty[s]   both groups, after their Q K^T                loader, before it loads there again  n div STAGES - 1
    v_full[s]    TMA: one block of values has landed           both groups, before P V              n div STAGES
    v_empty[s]   both groups, after their P V                  loader, before it loads there again  n div STAGES - 1
    turn[c]      the other group, once it has issued its GEMMs group c, before it issues its own    n (c = 1), n - 1 (c = 0)

The loader's order K(0), Q, K(1), V(0), K(2), V(1) .. V(last) is the order in which places become free. `turn` only orders:
without it the results would still be right.

Limits: bf16 and fp16, D = Dv = 64 or 128, T + 128 < 2**31 rows (TMA coordinates are int32 rows; addresses are 64-bit); values
must be finite in rows next to a document too, for TMA cannot stop at its end: they are multiplied by a weight of 0.

Checked without a GPU: compiled for sm_90 by triton 3.7.1 and 3.9.0 (gates/attention.py has the gates: no spill in a matrix
loop, the softmax beside P V in the binary too), and these very functions run under a simulator of barriers, TMA and
asynchronous wgmma with adversarial schedules (gluon_simulator.py in its tests). Compiled, simulated, not timed: dispatch does
not choose it by itself, impl="hopper" forces it, bench/hopper_check.py is what to run first on a GPU.
Method: Shah et al., FlashAttention-3, arXiv:2407.08608.   Bench: python -m chatmill.kernels.bench attention --match causal
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...dispatch import on_its_device
from ..rules import LOG2E, Rules
from ..tile_map import TileMap
from ..tiles import HOPPER_FORWARD

LOG2E_ = gl.constexpr(LOG2E)
LN2_ = gl.constexpr(0.6931471805599453)
# finite: a row that has seen nothing yet keeps this top
NEVER = gl.constexpr(-1.0e30)
# its name from triton 3.8 on; until 3.8 the other one, which 3.9 has removed
_tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# bytes of keys and values of the heads that run side by side: more would not stay in the 50 MB L2 of a Hopper
L2_BYTES = 32 << 20


@gluon.jit
def _rounds(items):
    """Items of this program. Rounds of one item per program go to and fro, so that none gets the longest of every round."""
    programs = gl.num_programs(0)
    whole = items // programs
    place = gl.program_id(0) + (whole & 1) * (programs - 1 - 2 * gl.program_id(0))
    return whole + gl.minimum(gl.maximum(items - whole * programs - place, 0), 1)


@gluon.jit
def _item(r, TILES, tiles, heads, together):
    """Start, end, low, lead, full and tail of the tile and the head of this program's round r; of the last item past the end.

    Heads come in sections of `together`, in each the tiles in order. Read one tile ahead: nothing waits for these numbers.
    """
    programs = gl.num_programs(0)
    place = r * programs + gl.program_id(0) + (r & 1) * (programs - 1 - 2 * gl.program_id(0))
    place = gl.minimum(place, tiles * heads - 1)
    section = place // (tiles * together)
    rest = place - section * tiles * together
    row = TILES + rest // together * 8
    head = section * together + rest % together
    return gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 4), gl.load(row + 5), gl.load(row + 6), head


@gluon.jit
def _load_block(desc, row, column, place, full, empty, n, STAGES: gl.constexpr):
    """Block n of a ring, once its place is empty."""
    s = n % STAGES
    mbarrier.wait(empty.index(s), ((n // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(s), desc.block_type.nbytes)
    _tma_load(desc, [row, column], full.index(s), place.index(s))


@gluon.jit
def attention_hopper_loader(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    TILES, tiles, heads, group, together, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp."""
    HALF: gl.constexpr = q_desc.block_type.shape[0]
    D: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    n = 0
    t = 0
    following = _item(0, TILES, tiles, heads, together)
    for r in range(_rounds(tiles * heads)):
        start, end, low, lead, full, tail, head = following
        following = _item(r + 1, TILES, tiles, heads, together)
        if end > start:
            steps = gl.maximum(lead + full + tail, 1)
            column = head // group * D
            row = low + _step(0, lead, full, tail) * BLOCK_N
            _load_block(k_desc, row, column, k_s, k_full, k_empty, n, STAGES)
            for c in gl.static_range(2):
                mbarrier.wait(q_empty.index(c), (t & 1) ^ 1)
                mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
                _tma_load(q_desc, [start + c * HALF, head * D], q_full.index(c), q_s.index(c))
            for i in range(1, steps):
                before = row
                row = low + _step(i, lead, full, tail) * BLOCK_N
                _load_block(k_desc, row, column, k_s, k_full, k_empty, n + i, STAGES)
                _load_block(v_desc, before, column, v_s, v_full, v_empty, n + i - 1, STAGES)
            _load_block(v_desc, row, column, v_s, v_full, v_empty, n + steps - 1, STAGES)
            n += steps
            t += 1


@gluon.jit
def _step(i, lead, full, tail):
    """Where the i-th step in order of work lies: first those at the end that need the mask, last first, then from the start."""
    return gl.where(i < tail, lead + full + tail - 1 - i, i - tail)


@gluon.jit
def _reciprocal(x):
    """1 / x to one unit in the last place; 0 for infinity. A division also scales huge divisors: 250 instructions a step."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _softmax(scores, top, total, keys, first, last, scale2, cap2, HAS_CAP: gl.constexpr, MASKED: gl.constexpr):
    """P of one step before rounding, the new top and sum, and by what the former ones shrink."""
    if HAS_CAP:
        scores = cap2 - 2.0 * cap2 * _reciprocal(1.0 + gl.exp2(scores * (scale2 * 2.0 * LOG2E_ / cap2)))
        factor = 1.0
    else:
        factor = scale2
    if MASKED:
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
        scores = gl.where(seen, scores, NEVER)
    new_top = gl.maximum(top, gl.max(scores, 1))
    offset = new_top * factor
    if MASKED:  # nothing seen yet: NEVER * factor + (-offset) would be the rounding of 1e30, not 0
        offset = gl.where(new_top == NEVER, 0.0, offset)
    p = gl.exp2(scores * factor - offset[:, None])
    shrink = gl.exp2((top - new_top) * factor)
    return p, new_top, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _group_step(
    acc, weights, top, total, n, t, keys, q, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty, turn, zero,
    first, last, scale2, cap2,
    WEIGHTS: gl.constexpr, STAGES: gl.constexpr, HAS_CAP: gl.constexpr, MASKED: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Issues Q K(n)^T and P(n-1) V(n-1) side by side, then the softmax of n while the other group has the tensor cores."""
    s = n % STAGES
    b = (n - 1) % STAGES
    p = gl.convert_layout(weights, WEIGHTS).to(q.dtype)
    mbarrier.wait(k_full.index(s), (n // STAGES) & 1)
    mbarrier.wait(v_full.index(b), ((n - 1) // STAGES) & 1)
    mbarrier.wait(turn.index(C), (n & 1) ^ (1 - C))
    scores_going = warpgroup_mma(q, k_s.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc_going = warpgroup_mma(p, v_s.index(b), acc, is_async=True)
    mbarrier.arrive(turn.index(1 - C), count=1)
    scores = warpgroup_mma_wait(1, deps=(scores_going,))
    mbarrier.arrive(k_empty.index(s), count=1)
    weights, top, total, shrink = _softmax(scores, top, total, keys, first, last, scale2, cap2, HAS_CAP, MASKED)
    # passes at once: its branch keeps the assembler from moving the wait for P V in front of the exponentials
    mbarrier.wait(q_full.index(C), t & 1)
    acc = warpgroup_mma_wait(0, deps=(acc_going,))
    mbarrier.arrive(v_empty.index(b), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, WEIGHTS.parent))[:, None]
    return acc, weights, top, total


@gluon.jit
def attention_hopper_group(
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
    OUT, LSE, TILES, BOUNDS, T, tiles, heads, together, scale2, cap2,
    O_ROW: gl.constexpr, STAGES: gl.constexpr, HAS_CAP: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Group C of four warps: rows C * HALF .. of every tile."""
    HALF: gl.constexpr = q_s.shape[1]
    D: gl.constexpr = q_s.shape[2]
    BLOCK_N: gl.constexpr = k_s.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    # 16 bytes a thread, so that a warp writes whole sectors
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    zero = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    q = q_s.index(C)
    n = 0
    t = 0
    following = _item(0, TILES, tiles, heads, together)
    for r in range(_rounds(tiles * heads)):
        start, end, low, lead, full, tail, head = following
        following = _item(r + 1, TILES, tiles, heads, together)
        if end > start:
            steps = gl.maximum(lead + full + tail, 1)
            rows = start + C * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
            inside = rows < end
            first = gl.load(BOUNDS + rows, mask=inside, other=0)
            last = gl.load(BOUNDS + T + rows, mask=inside, other=0)
            columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
            s = n % STAGES
            mbarrier.wait(q_full.index(C), t & 1)
            mbarrier.wait(k_full.index(s), (n // STAGES) & 1)
            mbarrier.wait(turn.index(C), (n & 1) ^ (1 - C))
            going = warpgroup_mma(q, k_s.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.arrive(turn.index(1 - C), count=1)
            scores = warpgroup_mma_wait(0, deps=(going,))
            mbarrier.arrive(k_empty.index(s), count=1)
            top = gl.full([HALF], NEVER, gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
            keys = low + _step(0, lead, full, tail) * BLOCK_N + columns
            weights, top, total, _ = _softmax(scores, top, total, keys, first, last, scale2, cap2, HAS_CAP, True)
            acc = gl.zeros([HALF, D], gl.float32, OUTPUT)
            masked = gl.maximum(lead + tail, 1)
            for i in range(1, masked):
                keys = low + _step(i, lead, full, tail) * BLOCK_N + columns
                acc, weights, top, total = _group_step(
                    acc, weights, top, total, n + i, t, keys, q, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty, turn, zero,
                    first, last, scale2, cap2, WEIGHTS, STAGES, HAS_CAP, True, C,
                )  # fmt: skip
            for i in range(masked, steps):
                acc, weights, top, total = _group_step(
                    acc, weights, top, total, n + i, t, columns, q, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty, turn,
                    zero, first, last, scale2, cap2, WEIGHTS, STAGES, HAS_CAP, False, C,
                )  # fmt: skip
            mbarrier.arrive(q_empty.index(C), count=1)
            n += steps
            t += 1
            b = (n - 1) % STAGES
            p = gl.convert_layout(weights, WEIGHTS).to(q.dtype)
            mbarrier.wait(v_full.index(b), ((n - 1) // STAGES) & 1)
            acc_going = warpgroup_mma(p, v_s.index(b), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc_going,))
            mbarrier.arrive(v_empty.index(b), count=1)
            some = total > 0.0  # else a row of no document
            whole = gl.where(some, total, 1.0)
            factor = 1.0 if HAS_CAP else scale2
            lse = gl.where(some, (top * factor + gl.log2(whole)) * LN2_, float("-inf"))
            wide_head = gl.cast(head, gl.int64)
            gl.store(LSE + wide_head * T + rows, lse, mask=inside)
            out = acc * gl.convert_layout(1.0 / whole, gl.SliceLayout(1, OUTPUT))[:, None]
            out = gl.convert_layout(out.to(q.dtype), STORED)
            at = C * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, STORED))
            channel = gl.arange(0, D, layout=gl.SliceLayout(0, STORED))
            out_base = OUT + gl.cast(start, gl.int64) * O_ROW + wide_head * D
            gl.store(out_base + at[:, None] * O_ROW + channel[None, :], out, mask=(start + at < end)[:, None])


@gluon.jit
def attention_forward_hopper_kernel(
    q_desc, k_desc, v_desc, OUT, LSE, TILES, BOUNDS, T, tiles, heads, group, together, scale2, cap2,
    O_ROW: gl.constexpr, STAGES: gl.constexpr, HAS_CAP: gl.constexpr,
):  # fmt: skip
    """out (T, Hq, D) and lse (Hq, T). scale2: scale * log2(e); cap2: softcap * log2(e); together: heads of a section."""
    HALF: gl.constexpr = q_desc.block_type.shape[0]
    D: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
        mbarrier.init(turn.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
        mbarrier.init(v_empty.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                attention_hopper_group,
                (
                    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
                    OUT, LSE, TILES, BOUNDS, T, tiles, heads, together, scale2, cap2, O_ROW, STAGES, HAS_CAP, 0,
                ),
            ),
            (
                attention_hopper_group,
                (
                    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
                    OUT, LSE, TILES, BOUNDS, T, tiles, heads, together, scale2, cap2, O_ROW, STAGES, HAS_CAP, 1,
                ),
            ),
            (
                attention_hopper_loader,
                (
                    q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    TILES, tiles, heads, group, together, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def why_not_hopper(dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why this tier cannot do a call; None where it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper tier takes bf16 and fp16, not {dtype}"
    if head_dim != value_dim or head_dim not in HOPPER_FORWARD:
        return f"the Hopper tier takes head dimensions {sorted(HOPPER_FORWARD)}, not {head_dim} and {value_dim}"
    return None


def attention_forward_hopper(q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap, rules: Rules) -> tuple[Tensor, Tensor]:
    """out (T, Hq, D) in q's dtype and lse (Hq, T) fp32. tile_map: make_tile_map(..., impl="hopper")."""
    if tile_map.config.forward != HOPPER_FORWARD[q.shape[2]]:
        raise ValueError('attention: this tile map is not for the Hopper tier: make it with make_tile_map(..., impl="hopper").')
    return launch(q, k, v, tile_map, rules, _multiprocessors(q.device))


@on_its_device
def launch(q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap, rules: Rules, programs: int) -> tuple[Tensor, Tensor]:
    """The kernel with the tile map's own tile sizes, on that many programs."""
    T, heads, D = q.shape
    block_m, block_n, num_warps, stages = tile_map.config.forward
    tiles, group = tile_map.forward.shape[0], heads // k.shape[1]
    if max(T + max(block_m, block_n), tiles * heads + programs) >= 1 << 31:
        raise ValueError(
            f"attention: the Hopper tier counts rows and tiles x heads in 32 bits; got T={T}, {tiles} tiles, {heads} heads. "
            "Set impl=triton, or split the row."
        )
    out, lse = q.new_empty(T, heads, D), q.new_empty(heads, T, dtype=torch.float32)
    if not tiles:
        return out, lse
    attention_forward_hopper_kernel[(min(programs, tiles * heads),)](
        _descriptor(q, block_m // 2), _descriptor(k, block_n), _descriptor(v, block_n), out, lse,
        tile_map.forward, tile_map.bounds, T, tiles, heads, group,
        heads_together(T, heads, group, D * q.element_size()), *rules.base2,
        O_ROW=heads * D, STAGES=stages, HAS_CAP=rules.softcap > 0, num_warps=num_warps,
    )  # fmt: skip
    return out, lse


def heads_together(T: int, heads: int, group: int, row_bytes: int) -> int:
    """Query heads whose tiles run side by side: the most that divide the heads and whose keys and values fit L2_BYTES."""
    kv_heads = heads // group
    fits = max(1, L2_BYTES // (2 * T * row_bytes))
    return group * max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= fits)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor of blocks of `rows` rows of one head; x (T, H, D) is copied where its layout is none TMA can read."""
    T, heads, D = x.shape
    size = x.element_size()
    adjacent = x.stride(2) == 1 and (heads == 1 or x.stride(1) == D)
    if not adjacent or x.stride(0) < heads * D or x.stride(0) * size % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    layout = gl.NVMMASharedLayout.get_default_for([rows, D], gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(x, [T, heads * D], [x.stride(0), 1], [rows, D], layout)


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
