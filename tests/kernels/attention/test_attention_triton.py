"""The portable Triton kernels against the fp64 reference: interpreted on a CPU, compiled where there is a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from chatmill.kernels import interpreter
from chatmill.kernels.attention.interface import attention, attention_with_lse
from chatmill.kernels.attention.reference import attention_reference
from chatmill.kernels.attention.rules import Rules
from chatmill.kernels.attention.tile_map import make_tile_map
from chatmill.kernels.attention.tiles import KernelConfig, TileConfig, kernel_config
from chatmill.kernels.attention.triton_parts import strides_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# relative error of the whole tensor against fp64 on the same (rounded) inputs
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
RULES = Rules(causal=True, window=0, softcap=0.0, scale=0.25)
CANARY = 777.0
SMALL = KernelConfig(TileConfig(16, 16, 4, 1), TileConfig(16, 16, 4, 1), TileConfig(16, 16, 4, 1))


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    if DEVICE.type == "cpu":
        interpreter.install()


def inputs(T: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    (hq, hk), (d, dv) = heads, dims
    shapes = [(T, hq, d), (T, hk, d), (T, hk, dv)]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def error(mine: Tensor, truth: Tensor) -> float:
    mine, truth = mine.detach().double(), truth.detach().double()
    return float((mine - truth).norm() / truth.norm().clamp_min(1e-12))


def compare(
    T: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    bounds: list[int] | None,
    dtype: torch.dtype,
    with_lse: bool = True,
    **options: Any,
) -> None:
    """Output, LSE and all gradients of the Triton kernels against the reference in fp64."""
    q, k, v = inputs(T, heads, dims, dtype)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(T, heads[0], dims[1], generator=generator).to(DEVICE, dtype)
    dlse = torch.randn(heads[0], T, generator=generator).to(DEVICE) * with_lse

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        finite = torch.where(lse.isfinite(), lse, torch.zeros((), dtype=lse.dtype, device=DEVICE))
        return (out * dout.to(out.dtype)).sum() + ((finite * dlse).sum() if with_lse else 0.0)

    out, lse = attention_with_lse(q, k, v, cu_seqlens=cu_seqlens, impl="triton", **options)
    mine = (out, lse[lse.isfinite()], *torch.autograd.grad(loss(out, lse), (q, k, v)))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    options.pop("tile_map", None)
    expected, expected_lse = attention_reference(*wide, cu_seqlens=cu_seqlens, **options)
    truth = (expected, expected_lse[expected_lse.isfinite()], *torch.autograd.grad(loss(expected, expected_lse), wide))
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), mine, truth, strict=True):
        # a gradient that is zero in exact arithmetic (one key per query) has rounding alone
        scale = max(error(a, b), 0.0) if b.norm() > 1e-6 else float(a.detach().double().norm()) * 1e-3
        assert scale < TOLERANCE[dtype], f"{name}: {scale:.2e}"


LAYOUTS = {
    "one document": None,
    "chats": [0, 13, 14, 52, 90, 123],
    "one token each": list(range(124)),
    "an empty one and a tail outside": [0, 30, 30, 99],
    "one long among short ones": [0, 2, 5, 110, 112, 123],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    compare(123, (4, 2), (16, 16), LAYOUTS[layout], dtype)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 9}, {"window": 40}, {"softcap": 3.0}, {"scale": 0.3}])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_caps_and_scales(options: dict[str, Any], causal: bool) -> None:
    compare(123, (2, 1), (16, 16), LAYOUTS["chats"], torch.float32, causal=causal, **options)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_head_groups(heads: tuple[int, int]) -> None:
    compare(67, heads, (16, 16), [0, 40, 67], torch.float32)


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (24, 40)])
def test_head_dimensions(dims: tuple[int, int]) -> None:
    compare(41, (2, 1), dims, [0, 17, 41], torch.float32, with_lse=False)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33])
def test_any_length(T: int) -> None:
    compare(T, (2, 1), (16, 16), None, torch.float32)


def test_float16() -> None:
    compare(70, (2, 1), (32, 32), [0, 50, 70], torch.float16)


@pytest.mark.slow
def test_an_odd_long_document() -> None:
    compare(331, (2, 1), (16, 16), None, torch.float32)
    compare(331, (2, 1), (16, 16), [0, 7, 304, 331], torch.bfloat16, window=100)


@pytest.mark.parametrize("seed", range(6))
def test_random_layouts_with_small_tiles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bounds = [0, *np.cumsum(rng.integers(0, 45, 5)).tolist()]
    T = bounds[-1] + int(rng.integers(0, 5)) or 1
    window, causal = [None, 3, 20][rng.integers(3)], bool(rng.integers(2))
    tile_map = make_tile_map(bounds, T, head_dim=16, window=window, causal=causal, config=SMALL)
    compare(T, (2, 1), (16, 16), bounds, torch.float32, causal=causal, window=window, tile_map=tile_map.to(DEVICE))


def test_sinks() -> None:
    q, k, v = inputs(50, (4, 2), (16, 16), torch.float32)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 8.0], device=DEVICE)
    out = attention(q, k, v, sinks=sinks, impl="triton")
    expected, _ = attention_reference(*(x.double() for x in (q, k, v)), sinks=sinks)
    assert error(out, expected) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(dtype: torch.dtype) -> None:
    q, k, v = inputs(100, (2, 1), (64, 64), dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(100, 2, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)

    def results(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [out, *torch.autograd.grad((out * dout.to(out.dtype)).sum(), leaves)]

    mine = results(attention(q, k, v, impl="triton"), [q, k, v])
    truth = results(attention_reference(*wide)[0], wide)
    theirs = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True)
    other = results(theirs[0].transpose(0, 1), [q, k, v])
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), mine, other, truth, strict=True):
        assert error(a, t) <= 2 * error(b, t), f"{name}: {error(a, t):.2e} against {error(b, t):.2e} of PyTorch"


@contextmanager
def canaries(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Copies of (T, H, D) tensors inside larger buffers of canaries, which must still be there afterwards."""
    buffers = []
    for x in tensors:
        buffer = torch.full((x.shape[0] + 64, x.shape[1] + 2, x.shape[2] + 32), CANARY, dtype=x.dtype, device=x.device)
        buffer[32:-32, 1:-1, 16:-16] = x
        buffers.append(buffer)
    yield [b[32:-32, 1:-1, 16:-16] for b in buffers]
    for buffer in buffers:
        buffer[32:-32, 1:-1, 16:-16] = CANARY
        assert (buffer == CANARY).all(), "written outside"


@pytest.mark.parametrize("dims", [(16, 16), (24, 40)])
def test_nothing_outside_is_read_or_written(dims: tuple[int, int]) -> None:
    from chatmill.kernels.attention import triton_tier as tier

    T, bounds = 77, [0, 20, 23, 70]
    q, k, v = (x.detach() for x in inputs(T, (4, 2), dims, torch.float32))
    dout, config = torch.randn_like(q[..., :1].expand(T, 4, dims[1])), SMALL
    tile_map = make_tile_map(bounds, T, head_dim=max(dims), config=config).to(DEVICE)
    out, lse = tier.attention_forward_triton(q, k, v, tile_map, RULES)
    expected = tier.attention_backward_triton(q, k, v, out, lse, dout, None, tile_map, RULES)
    with canaries(q, k, v, dout) as (q2, k2, v2, dout2):
        out2, lse2 = tier.attention_forward_triton(q2, k2, v2, tile_map, RULES)
        found = tier.attention_backward_triton(q2, k2, v2, out2, lse2, dout2, None, tile_map, RULES)
    assert torch.equal(out, out2)
    assert torch.equal(lse, lse2)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_outputs_stay_inside_their_buffers() -> None:
    from chatmill.kernels.attention import triton_tier as tier

    T, heads, D = 37, 2, 24
    q, k, v = (x.detach() for x in inputs(T, (heads, heads), (D, D), torch.float32))
    tile_map = make_tile_map([0, 11, 30], T, head_dim=D, config=SMALL).to(DEVICE)
    with canaries(torch.zeros_like(q)) as (out,):
        lse = torch.full((heads + 2, T), CANARY, device=DEVICE)
        rules = Rules(True, 0, 0.0, 0.2)
        tier.attention_forward_kernel[(tile_map.forward.shape[0] * heads,)](
            q, k, v, out, lse[1:-1], tile_map.forward, tile_map.bounds, T, heads, 1, *rules.base2, *strides_of(q, k, v, out),
            **tier._constants(q, v, rules), **tier._blocks(tile_map.config.forward),
        )  # fmt: skip
        assert error(out[:30], attention_reference(*(x[:30] for x in (q, k, v)), scale=0.2,
                     cu_seqlens=torch.tensor([0, 11, 30], device=DEVICE))[0]) < 3e-6  # fmt: skip
        assert (out[30:] == 0).all()
        assert (lse[[0, -1]] == CANARY).all()


def test_strided_inputs_and_gradients_are_taken() -> None:
    q, k, v = inputs(40, (4, 2), (16, 16), torch.float32)
    packed = torch.cat([q, k, v], 1)
    expected = attention(q, k, v, impl="triton")
    assert torch.equal(attention(packed[:, :4], packed[:, 4:6], packed[:, 6:], impl="triton"), expected)
    wide = torch.randn(40, 16, 4, device=DEVICE).transpose(1, 2)
    grads = (torch.autograd.grad(expected, (q, k, v), d, retain_graph=True) for d in (wide, wide.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_offsets_beyond_32_bits_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":  # it would copy the whole buffer onto itself; only the touched pages of it exist
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    T, stride = 40, 1 << 26  # row 32 starts at element 2**31
    buffer = torch.empty(stride * (T - 1) + 16, dtype=torch.float16, device=DEVICE)
    far = buffer.as_strided((T, 1, 16), (stride, 16, 1))
    near = inputs(T, (1, 1), (16, 16), torch.float16)[0].detach()
    far.copy_(near)
    tile_map = make_tile_map([0, T], T, head_dim=16, config=SMALL).to(DEVICE)
    assert torch.equal(
        attention(far, near, far, tile_map=tile_map, impl="triton"),
        attention(near, near, near, tile_map=tile_map, impl="triton"),
    )
    out, lse = (x.detach() for x in attention_with_lse(near, near, near, tile_map=tile_map, impl="triton"))
    from chatmill.kernels.attention.triton_tier import attention_backward_triton

    rest = (out, lse, near, None, tile_map, RULES)
    mine, expected = (attention_backward_triton(x, near, x, *rest) for x in (far, near))
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_two_runs_are_bitwise_equal() -> None:
    q, k, v = inputs(45, (2, 1), (16, 16), torch.bfloat16)
    cu_seqlens = torch.tensor([0, 7, 15, 45], dtype=torch.int32, device=DEVICE)
    runs = []
    for _ in range(2):
        out = attention(q, k, v, cu_seqlens=cu_seqlens, impl="triton")
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_tile_map_made_in_advance_gives_the_same_and_a_wrong_one_is_refused() -> None:
    q, k, v = inputs(50, (2, 1), (16, 16), torch.float32)
    bounds = torch.tensor([0, 20, 50], dtype=torch.int32, device=DEVICE)
    make = {"head_dim": 16, "dtype": torch.float32, "device": DEVICE}
    maps = {
        None: make_tile_map([0, 20, 50], 50, **make).to(DEVICE),
        5: make_tile_map([0, 20, 50], 50, window=5, **make).to(DEVICE),
    }
    for window in (None, 5):
        mine = attention(q, k, v, cu_seqlens=bounds, window=window, tile_map=maps[window], impl="triton")
        assert torch.equal(mine, attention(q, k, v, cu_seqlens=bounds, window=window, impl="triton"))
    with pytest.raises(ValueError, match=r"the tile map was made for T=50, causal=True, window=5"):
        attention(q, k, v, cu_seqlens=bounds, tile_map=maps[5], impl="triton")


def test_opcheck_passes() -> None:
    q, k, v = inputs(24, (2, 1), (16, 16), torch.float32)
    tile_map = make_tile_map([0, 5, 24], 24, head_dim=16, dtype=torch.float32, device=DEVICE).to(DEVICE)
    bounds = torch.tensor([0, 5, 24], dtype=torch.int32, device=DEVICE)
    arguments = (q, k, v, bounds, tile_map.data, list(tile_map.header), True, 0, 0.0, 0.25, "triton")
    torch.library.opcheck(torch.ops.chatmill.attention_forward.default, arguments)


def test_it_compiles_into_one_graph_and_gives_the_same() -> None:
    q, k, v = inputs(48, (2, 1), (16, 16), torch.float32)
    bounds = torch.tensor([0, 11, 48], dtype=torch.int32, device=DEVICE)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, cu_seqlens=bounds, impl="triton").sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    mine = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for a, b in zip(mine, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_selective_checkpointing_keeps_the_named_op_and_runs_it_once() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    q, k, v = inputs(30, (2, 1), (16, 16), torch.float32)
    calls = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is torch.ops.chatmill.attention_forward.default:
            calls.append(context.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def block(q: Tensor) -> Tensor:
        return attention(q * 2, k, v, impl="triton").sin()

    out = checkpoint(block, q, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    expected = torch.autograd.grad(block(q).sum(), q)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], expected)
    assert False in calls


@pytest.mark.parametrize("arch", [0, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_every_generation_has_tiles(arch: int, head_dim: int, element_bytes: int) -> None:
    for short in (False, True):
        config = kernel_config(arch, element_bytes, head_dim, short)
        assert all(tile.block_m >= 16 and tile.block_n >= 16 and tile.num_warps in (4, 8) for tile in config)
