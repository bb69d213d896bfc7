"""The fused backward for Hopper: interpreted against the fp64 reference, on a Hopper GPU compiled; and how it is chosen."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from chatmill.kernels import interpreter
from chatmill.kernels.attention.hopper import backward as attention_hopper_backward
from chatmill.kernels.attention.hopper.backward import _rows_of_heads, attention_backward_hopper
from chatmill.kernels.attention.interface import _may_fuse
from chatmill.kernels.attention.operators import attention_backward
from chatmill.kernels.attention.reference import attention_reference
from chatmill.kernels.attention.rules import Rules
from chatmill.kernels.attention.tile_map import TileMap, make_tile_map
from chatmill.kernels.attention.tiles import KernelConfig, TileConfig
from chatmill.kernels.bench.hopper_check import why_unfit

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = torch.device("cuda" if ON_HOPPER else "cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3}
# interpreted: small tiles, so that small inputs have inner, diagonal and boundary steps; the GPU takes those that ship
TILE = TileConfig(64, 128, 8, 2) if ON_HOPPER else TileConfig(16, 32, 4, 1)
CONFIG = KernelConfig(TILE, TILE, TILE)


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    if DEVICE.type == "cpu":
        interpreter.install()
    elif (reason := why_unfit("backward")) is not None:  # found in another process, so that a hang costs two minutes
        pytest.fail(reason, pytrace=False)


def problem(T: int, heads: tuple[int, int], D: int, dtype: torch.dtype, bounds: list[int], **rules: Any) -> dict[str, Any]:
    """Inputs of a backward with its forward's true out and lse, and the fp64 gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(T, h, D, device=DEVICE).to(dtype) for h in (heads[0], heads[1], heads[1]))
    dout, dlse = torch.randn(T, heads[0], D, device=DEVICE).to(dtype), torch.randn(heads[0], T, device=DEVICE)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    options = {name: value for name, value in rules.items() if value}
    out, lse = attention_reference(*wide, cu_seqlens=torch.tensor(bounds, device=DEVICE), **{"causal": False} | options)
    seen = torch.where(lse.isfinite(), lse, torch.zeros_like(lse))
    truth = torch.autograd.grad((out * dout).sum() + (seen * dlse).sum(), wide)
    tile_map = make_tile_map(
        bounds, T, head_dim=D, window=rules.get("window"), causal=rules.get("causal", False), config=CONFIG, device=DEVICE
    )
    given = {"q": q, "k": k, "v": v, "out": out.detach().to(dtype), "lse": lse.detach().float(), "dout": dout, "dlse": dlse}
    return {**given, "tile_map": tile_map.to(DEVICE), "truth": truth}


def fused(p: dict[str, Any], softcap: float = 0.0) -> tuple[Tensor, ...]:
    tensors = (p[name] for name in ("q", "k", "v", "out", "lse", "dout", "dlse", "tile_map"))
    return attention_backward_hopper(*tensors, Rules(True, 0, softcap, p["q"].shape[2] ** -0.5))


def check(grads: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for name, mine, expected in zip(("dq", "dk", "dv"), grads, truth, strict=True):
        assert torch.isfinite(mine).all(), name
        error = float((mine.double() - expected).norm() / expected.norm())
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"


LAYOUTS = {
    "one document": [0, 131],
    "chats": [0, 7, 9, 70, 100, 131],
    "one long among short ones": [0, 2, 3, 5, 110, 112, 131],
    "an empty one and a tail outside": [0, 30, 30, 99],
    "one token each": [*range(132)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [64, 128])
def test_layouts(layout: str, D: int) -> None:
    p = problem(131, (2, 1), D, torch.bfloat16, LAYOUTS[layout], causal=True)
    grads = fused(p)
    check(grads, p["truth"], torch.bfloat16)
    last = LAYOUTS[layout][-1]
    assert all((g[last:] == 0).all() for g in grads)


@pytest.mark.parametrize(
    "rules", [{"causal": True, "window": 1}, {"causal": True, "window": 37}, {"causal": False}, {"causal": False, "window": 20}]
)
def test_windows_and_both_directions(rules: dict[str, Any]) -> None:
    p = problem(101, (1, 1), 64, torch.float16, [0, 13, 96], **rules)
    check(fused(p), p["truth"], torch.float16)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)])
def test_head_groups_and_soft_cap(heads: tuple[int, int]) -> None:
    p = problem(49, heads, 64, torch.float16, [0, 40, 49], causal=True, softcap=2.0)
    check(fused(p, softcap=2.0), p["truth"], torch.float16)


@pytest.mark.parametrize("T", [1, 3, 16, 33])
def test_any_length(T: int) -> None:
    p = problem(T, (2, 1), 64, torch.float16, [0, T], causal=True)
    check(fused(p), p["truth"], torch.float16)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_scores_far_below_zero_in_what_is_not_seen_are_no_nan() -> None:
    # exp2(0 - lse) of a row that is not the tile's overflows: infinity times zero must not come up
    p = problem(90, (1, 1), 64, torch.bfloat16, [0, 21, 61], causal=True)
    q = p["q"].float()
    q[:, :, 0], p["k"][:, :, 0] = 300.0, -20.0
    p["q"] = q.to(torch.bfloat16)
    wide = [p[name].double().requires_grad_() for name in "qkv"]
    out, lse = attention_reference(*wide, cu_seqlens=torch.tensor([0, 21, 61], device=DEVICE))
    assert lse[:, :61].max() < -500
    p |= {"out": out.detach().to(torch.bfloat16), "lse": lse.detach().float(), "dlse": None}
    grads = fused(p)
    assert all(torch.isfinite(g).all() for g in grads)
    truth = torch.autograd.grad((out * p["dout"]).sum(), wide)[2]
    assert float((grads[2].double() - truth).norm() / truth.norm()) < TOLERANCE[torch.bfloat16]


def test_it_adds_to_no_row_outside_and_takes_slices_of_a_fused_projection() -> None:
    p = problem(45, (2, 1), 64, torch.bfloat16, [0, 20, 41], causal=True)
    expected = fused(p)
    packed = torch.full((45 + 8, 8, 64), 777.0, dtype=torch.bfloat16, device=DEVICE)
    views = {"q": packed[4:-4, 1:3], "k": packed[4:-4, 3:4], "v": packed[4:-4, 4:5], "dout": packed[4:-4, 5:7]}
    for name, view in views.items():
        view.copy_(p[name])
        assert _rows_of_heads(view).data_ptr() == view.data_ptr(), "no copy"
    before = packed.clone()
    found = fused(p | views)
    assert torch.equal(packed, before)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if ON_HOPPER else 0.0, atol=1e-3 if ON_HOPPER else 0.0)


def test_layouts_that_descriptors_cannot_take_are_copied() -> None:
    p = problem(20, (2, 1), 64, torch.bfloat16, [0, 20], causal=True)
    heads_first = p["q"].transpose(0, 1).contiguous().transpose(0, 1)
    odd = torch.zeros(20, 2, 65, dtype=torch.bfloat16, device=DEVICE)[:, :, 1:].copy_(p["dout"])
    assert all(_rows_of_heads(x).is_contiguous() for x in (heads_first, odd))
    check(fused(p | {"q": heads_first, "dout": odd}), p["truth"], torch.bfloat16)


def test_the_registered_backward_takes_it_by_name_and_refuses_what_it_cannot() -> None:
    p = problem(40, (2, 1), 64, torch.bfloat16, [0, 15, 40], causal=True)
    tile_map: TileMap = p["tile_map"]
    cu_seqlens = torch.tensor([0, 15, 40], dtype=torch.int32, device=DEVICE)
    inputs = [p[name] for name in ("q", "k", "v", "out", "lse", "dout", "dlse")]
    rules = (cu_seqlens, tile_map.data, list(tile_map.header), True, 0, 0.0, 0.125)
    both = {impl: attention_backward(*inputs, *rules, impl) for impl in ("hopper", "hopper-fused")}
    for impl, grads in both.items():
        check(grads, p["truth"], torch.bfloat16)
        assert all(g.is_contiguous() for g in grads), impl
    with pytest.raises(ValueError, match="the fused backward takes bf16 and fp16"):
        fused({name: x.float() if isinstance(x, Tensor) else x for name, x in p.items()})


def test_it_runs_only_where_runs_may_differ_and_registers_suffice() -> None:
    assert _may_fuse(128, 0.0, False)
    assert _may_fuse(64, 20.0, False)
    assert not _may_fuse(64, 0.0, True)
    assert not _may_fuse(128, 20.0, False)


def test_dense_inputs_that_begin_between_16_bytes_are_taken_and_no_rows_are_no_launch() -> None:
    p = problem(20, (2, 1), 64, torch.bfloat16, [0, 20], causal=True)
    shifted = torch.zeros(20 * 2 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(20, 2, 64).copy_(p["q"])
    assert shifted.is_contiguous() and shifted.data_ptr() % 16
    check(fused(p | {"q": shifted}), p["truth"], torch.bfloat16)
    # the driver refuses a descriptor of no rows
    none = {name: p[name][:0] for name in ("q", "k", "v", "out", "dout")}
    none |= {"lse": p["lse"][:, :0], "dlse": None, "tile_map": make_tile_map([0, 0], 0, head_dim=64, config=CONFIG).to(DEVICE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_hopper_backward, "_columns", None)
        assert [tuple(g.shape) for g in fused(none)] == [(0, 2, 64), (0, 1, 64), (0, 1, 64)]
