"""Attention on a real GPU: every shipped size, accuracy against PyTorch, determinism, memory, no wait for the host.

pytest -m gpu tests/kernels/attention/test_attention_gpu.py
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chatmill.kernels.attention import attention, attention_reference, make_tile_map
from chatmill.kernels.attention.decode import decode_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
TIERS = ["triton"]


def inputs(T: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    (hq, hk), (d, dv) = heads, dims
    return [torch.randn(T, h, c, device="cuda", dtype=dtype, requires_grad=True) for h, c in ((hq, d), (hk, d), (hk, dv))]


def chats(T: int, longest: int, seed: int = 0) -> Tensor:
    rng, bounds = np.random.default_rng(seed), [0]
    while bounds[-1] < T:
        bounds.append(min(T, bounds[-1] + int(rng.integers(1, longest))))
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


def results(out: Tensor, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad((out * dout.to(out.dtype)).sum(), leaves)]


def error(mine: Tensor, truth: Tensor) -> float:
    return float((mine.double() - truth.double()).norm() / truth.double().norm())


def compare(tier: str, T: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, **options: Any) -> None:
    """Error against fp64 at most twice that of plain torch operations in the same dtype's rounding."""
    leaves = inputs(T, heads, dims, dtype)
    dout = torch.randn(T, heads[0], dims[1], device="cuda", dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = results(attention_reference(*wide, **options)[0], wide, dout)
    mine = results(attention(*leaves, impl=tier, **options), leaves, dout)
    limit = 1.2e-2 if dtype == torch.bfloat16 else 2e-3
    for name, a, t in zip(("out", "dq", "dk", "dv"), mine, truth, strict=True):
        assert torch.isfinite(a).all(), name
        assert error(a, t) < limit, f"{name}: {error(a, t):.2e}"


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("longest", [60, 700, 10_000])
def test_every_head_dimension_over_short_and_long_documents(tier: str, dims: tuple[int, int], longest: int) -> None:
    compare(tier, 1507, (4, 2), dims, torch.bfloat16, cu_seqlens=chats(1507, longest))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "options", [{"window": 100}, {"softcap": 20.0}, {"causal": False}, {"causal": False, "window": 77}, {"scale": 0.05}]
)
@pytest.mark.parametrize("D", [64, 128])
def test_options(tier: str, options: dict[str, Any], D: int) -> None:
    compare(tier, 1000, (4, 1), (D, D), torch.float16, cu_seqlens=chats(1000, 400), **options)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_it_errs_at_most_twice_as_much_as_pytorch(tier: str, dtype: torch.dtype, D: int) -> None:
    leaves = inputs(2048, (8, 2), (D, D), dtype)
    dout = torch.randn(2048, 8, D, device="cuda", dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = results(attention_reference(*wide)[0], wide, dout)
    mine = results(attention(*leaves, impl=tier), leaves, dout)
    theirs = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in leaves), is_causal=True, enable_gqa=True)
    other = results(theirs[0].transpose(0, 1), leaves, dout)
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), mine, other, truth, strict=True):
        assert error(a, t) <= 2 * error(b, t), f"{name}: {error(a, t):.2e} against {error(b, t):.2e}"


@pytest.mark.parametrize("tier", TIERS)
def test_ten_runs_are_bitwise_equal(tier: str) -> None:
    leaves = inputs(4096, (8, 2), (128, 128))
    bounds, dout = chats(4096, 900), torch.randn(4096, 8, 128, device="cuda", dtype=torch.bfloat16)
    first = results(attention(*leaves, cu_seqlens=bounds, impl=tier), leaves, dout)
    for _ in range(9):
        again = results(attention(*leaves, cu_seqlens=bounds, impl=tier), leaves, dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("tier", TIERS)
def test_every_element_is_written(tier: str) -> None:
    T, bounds = 777, torch.tensor([0, 5, 700], dtype=torch.int32, device="cuda")
    leaves = inputs(T, (4, 2), (64, 64))
    poison = [torch.full((1 << 22,), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    del poison  # the allocator hands this memory out again
    out = attention(*leaves, cu_seqlens=bounds, impl=tier)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    assert (out[700:] == 0).all()
    assert all((g[700:] == 0).all() for g in grads)


@pytest.mark.parametrize("tier", TIERS)
def test_with_a_plan_the_host_never_waits(tier: str) -> None:
    T = 2048
    leaves, bounds = inputs(T, (8, 2), (64, 64)), chats(2048, 300)
    tile_map = make_tile_map(bounds.cpu().numpy(), T, head_dim=64, device=torch.device("cuda", 0)).to("cuda")
    attention(*leaves, cu_seqlens=bounds, tile_map=tile_map, impl=tier).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*leaves, cu_seqlens=bounds, tile_map=tile_map, impl=tier).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tier", TIERS)
def test_memory_grows_with_the_tokens_not_their_square(tier: str) -> None:
    peaks = []
    for T in (4096, 16384):
        leaves = inputs(T, (8, 2), (64, 64))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(*leaves, impl=tier).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del leaves
    assert peaks[1] < 5 * peaks[0]


def test_offsets_beyond_32_bits_on_a_long_row() -> None:
    T = (1 << 31) // (16 * 128) + 130  # 16 heads x 128 channels: elements past 2**31
    q = torch.randn(T, 16, 128, device="cuda", dtype=torch.bfloat16)
    bounds = torch.tensor([0, T - 100, T], dtype=torch.int32, device="cuda")
    out = attention(q, q[:, :1], q[:, :1], cu_seqlens=bounds, window=64, impl="triton")
    tail, _ = attention_reference(q[-100:].double(), q[-100:, :1].double(), q[-100:, :1].double(), window=64)
    assert error(out[-100:], tail) < 1e-2


def test_compiled_by_inductor_it_gives_the_same() -> None:
    leaves, bounds = inputs(512, (4, 2), (64, 64)), chats(512, 100)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, cu_seqlens=bounds, impl="triton").float().sin().sum()

    mine = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(mine, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert error(a, b) < 1e-2


@pytest.mark.parametrize("impl", ["sdpa", "flex", "flash"])
def test_other_tiers_agree_where_they_are_installed(impl: str) -> None:
    leaves, bounds = inputs(600, (4, 2), (64, 64)), chats(600, 200)
    longest = int(bounds.diff().max())
    try:
        out = attention(*leaves, cu_seqlens=bounds, max_seqlen=longest, impl=impl)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    expected, _ = attention_reference(*(x.double() for x in leaves), cu_seqlens=bounds)
    assert error(out, expected) < 1e-2


@pytest.mark.parametrize("D", [64, 128])
def test_decoding_over_a_long_cache(D: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 8, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(3, 5000, 2, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.tensor([5000, 1, 1234], dtype=torch.int32, device="cuda")
    expected = decode_attention(q.double(), k.double(), v.double(), lengths, impl="torch")
    assert error(decode_attention(q, k, v, lengths, impl="triton"), expected) < 1e-2
