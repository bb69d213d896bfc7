"""The Hopper forward, run by the simulator: right under adversarial schedules, and every broken barrier is seen."""

import subprocess
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from tests.kernels.attention.gluon_memory import DeadlockError, RaceError, SimulationError
from tests.kernels.attention.gluon_simulator import Edits, Simulated

from chatmill.kernels import dispatch, interpreter
from chatmill.kernels.attention.hopper import forward as attention_hopper
from chatmill.kernels.attention.hopper.forward import attention_forward_hopper, heads_together, why_not_hopper
from chatmill.kernels.attention.interface import attention
from chatmill.kernels.attention.reference import attention_reference
from chatmill.kernels.attention.rules import Rules
from chatmill.kernels.attention.tile_map import make_tile_map
from chatmill.kernels.attention.tiles import HOPPER_FORWARD, KernelConfig, TileConfig
from chatmill.kernels.bench import hopper_check as attention_hopper_check

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the kernel itself runs: test_attention_hopper_gpu.py"
)
KERNEL = "attention_forward_hopper_kernel"
UNUSED = TileConfig(16, 16, 4, 1)
# two groups of 8 rows, 8 keys a step, a ring of 2 (ring of 3: no power of two)
SMALL, RING_OF_3 = TileConfig(16, 8, 4, 2), TileConfig(16, 8, 4, 3)


def tensors(T: int, heads: int, kv_heads: int, D: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(T, h, D, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


def simulate(
    monkeypatch: pytest.MonkeyPatch, qkv: Sequence[Tensor], bounds: Sequence[int], *, programs: int = 3, seed: int = 0,
    edits: Edits | None = None, tiles: TileConfig = SMALL, softcap: float = 0.0, **rules: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, _, D = qkv[0].shape
    tile_map = make_tile_map(bounds, T, head_dim=D, config=KernelConfig(tiles, UNUSED, UNUSED), **rules)
    simulated = Simulated(attention_hopper, KERNEL, seed, edits)
    monkeypatch.setattr(attention_hopper, KERNEL, simulated)
    out, lse = attention_hopper.launch(*qkv, tile_map, Rules(True, 0, softcap, D**-0.5), programs)
    monkeypatch.undo()
    assert all((stored == 1).all() for stored in simulated.stored[:2]), "out and lse are written once, every element"
    return out, lse


def compare(found: tuple[Tensor, Tensor], qkv: Sequence[Tensor], bounds: Sequence[int], **rules: Any) -> None:
    out, lse = found
    expected, expected_lse = attention_reference(*(x.double() for x in qkv), cu_seqlens=torch.tensor(bounds), **rules)
    assert (out.double() - expected).norm() <= 4e-3 * expected.norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


CASES: dict[str, tuple[list[int], int, dict[str, Any]]] = {
    "one token": ([0, 1], 1, {}),
    "one document, ragged": ([0, 101], 101, {}),
    "one document, longer than its window": ([0, 101], 101, {"window": 21}),
    "documents of all sorts and rows of none": ([0, 5, 9, 40, 40, 64, 99], 107, {}),
    "the same with a window": ([0, 5, 9, 40, 40, 64, 99], 107, {"window": 13}),
    "many short documents": ([*range(0, 120, 3), 121], 121, {}),
    "both directions": ([0, 20, 70], 70, {"causal": False}),
    "soft-cap": ([0, 30, 61], 61, {"softcap": 3.0}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_every_layout_equals_the_reference_under_adversarial_schedules(
    monkeypatch: pytest.MonkeyPatch, case: str, seed: int
) -> None:
    bounds, T, rules = CASES[case]
    qkv = tensors(T, 2, 1)
    found = simulate(
        monkeypatch, qkv, bounds, seed=seed, programs=1 + 2 * seed, tiles=RING_OF_3 if seed == 1 else SMALL, **rules
    )
    compare(found, qkv, bounds, **rules)


def test_hundreds_of_documents_and_one_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [*range(0, 400, 2), 520]
    qkv = tensors(520, 1, 1)
    compare(simulate(monkeypatch, qkv, bounds, programs=2), qkv, bounds)


@pytest.mark.parametrize("programs", [1, 5, 100])
def test_grouped_heads_in_sections_on_any_number_of_programs(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    qkv = tensors(33, 6, 3, dtype=torch.float16)
    monkeypatch.setattr(attention_hopper, "L2_BYTES", 2 * 33 * 16 * 2)  # one key head at a time
    assert heads_together(33, 6, 2, 32) == 2
    compare(simulate(monkeypatch, qkv, [0, 20, 33], programs=programs), qkv, [0, 20, 33])


@pytest.mark.parametrize("layout", ["one projection", "heads first", "expanded"])
def test_strided_inputs(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    T, D = 40, 16
    generator = torch.Generator().manual_seed(2)
    if layout == "one projection":
        qkv = torch.randn(T, 4, D, generator=generator).bfloat16().split((2, 1, 1), 1)
    elif layout == "heads first":
        qkv = [torch.randn(h, T, D, generator=generator).bfloat16().transpose(0, 1) for h in (2, 2, 2)]
    else:
        qkv = [torch.randn(T, 1, D, generator=generator).bfloat16().expand(T, 2, D) for _ in range(3)]
    compare(simulate(monkeypatch, qkv, [0, 11, T]), qkv, [0, 11, T])


LOADER, GROUP, STEP, BLOCK = "attention_hopper_loader", "attention_hopper_group", "_group_step", "_load_block"
ANY = SimulationError
# function, text, replacement, what the simulator must call it
BREAKS: dict[str, tuple[str, str, str, type[SimulationError]]] = {
    "the loader does not wait for an empty place": (
        BLOCK, "    mbarrier.wait(empty.index(s), ((n // STAGES) & 1) ^ 1)\n", "", ANY,
    ),
    "the loader waits for the other phase": (BLOCK, "& 1) ^ 1)", "& 1))", DeadlockError),
    "the loader expects too few bytes": (BLOCK, ".nbytes)", ".nbytes // 2)", ANY),
    "the loader overwrites queries in use": (
        LOADER, "                mbarrier.wait(q_empty.index(c), (t & 1) ^ 1)\n", "", ANY,
    ),
    "the loader starts its rings anew with every tile": (LOADER, "            n += steps\n", "", ANY),
    "the loader forgets the last values": (
        LOADER,
        "            _load_block(v_desc, row, column, v_s, v_full, v_empty, n + steps - 1, STAGES)\n", "", DeadlockError,
    ),
    "a group does not wait for its queries": (
        GROUP, "            mbarrier.wait(q_full.index(C), t & 1)\n", "", RaceError,
    ),
    "a group does not wait for keys": (STEP, "    mbarrier.wait(k_full.index(s), (n // STAGES) & 1)\n", "", RaceError),
    "a group does not wait for values": (STEP, "    mbarrier.wait(v_full.index(b), ((n - 1) // STAGES) & 1)\n", "", RaceError),
    "a group does not wait for the last values": (
        GROUP, "            mbarrier.wait(v_full.index(b), ((n - 1) // STAGES) & 1)\n", "", RaceError,
    ),
    "a group waits for the wrong phase of the keys": (
        STEP, "k_full.index(s), (n // STAGES) & 1", "k_full.index(s), 1", ANY,
    ),
    "keys are released before they are read": (
        STEP,
        "    scores = warpgroup_mma_wait(1, deps=(scores_going,))\n    mbarrier.arrive(k_empty.index(s), count=1)\n",
        "    mbarrier.arrive(k_empty.index(s), count=1)\n    scores = warpgroup_mma_wait(1, deps=(scores_going,))\n", RaceError,
    ),
    "values are released before they are read": (
        STEP,
        "    acc = warpgroup_mma_wait(0, deps=(acc_going,))\n    mbarrier.arrive(v_empty.index(b), count=1)\n",
        "    mbarrier.arrive(v_empty.index(b), count=1)\n    acc = warpgroup_mma_wait(0, deps=(acc_going,))\n", RaceError,
    ),
    "values are never released": (STEP, "    mbarrier.arrive(v_empty.index(b), count=1)\n", "", DeadlockError),
    "queries are never released": (GROUP, "            mbarrier.arrive(q_empty.index(C), count=1)\n", "", DeadlockError),
    "the accumulator is used while the product runs": (STEP, "acc = warpgroup_mma_wait(0,", "acc = warpgroup_mma_wait(1,", ANY),
    "one group alone empties a place": (KERNEL, "k_empty.index(s), count=2", "k_empty.index(s), count=1", ANY),
    "the turn is never handed on": (STEP, "    mbarrier.arrive(turn.index(1 - C), count=1)\n", "", DeadlockError),
    "both groups write the same rows": (GROUP, "at = C * HALF +", "at = 0 * HALF +", ANY),
    "rows beyond the tile are written": (GROUP, "mask=(start + at < end)[:, None]", "mask=None", ANY),
}  # fmt: skip


@pytest.mark.parametrize("damage", BREAKS)
def test_a_broken_kernel_is_caught(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    function, old, new, kind = BREAKS[damage]
    qkv = tensors(90, 1, 1)
    for seed in range(2):  # under any schedule: clocks tell, not luck
        with pytest.raises(kind):
            simulate(monkeypatch, qkv, [0, 30, 90], programs=1, seed=seed, edits={function: (old, new)})
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("_softmax", "keys[None, :] < last[:, None]", "keys[None, :] <= last[:, None]"),
        ("_softmax", "total * shrink + gl.sum(p, 1)", "total + gl.sum(p, 1)"),
        ("_step", "lead + full + tail - 1 - i", "tail - 1 - i"),
        ("_group_step", "acc = acc * gl.convert_layout(shrink", "acc = acc * gl.convert_layout(1 + 0 * shrink"),
        ("attention_hopper_loader", "head // group * D", "head * 0"),
    ],
)
def test_wrong_numbers_are_seen(monkeypatch: pytest.MonkeyPatch, function: str, old: str, new: str) -> None:
    qkv, bounds = tensors(90, 4, 2), [0, 20, 90]
    found = simulate(monkeypatch, qkv, bounds, window=40, edits={function: (old, new)})
    with pytest.raises(AssertionError):
        compare(found, qkv, bounds, window=40)


def test_a_deadlock_names_who_waits_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    damage = {"attention_hopper_group": ("            mbarrier.arrive(q_empty.index(C), count=1)\n", "")}
    words = r"partition 2 \(attention_hopper_loader\) waits for q_empty\[0\] \(0 phases over, 0 of 1 arrivals\), parity 0"
    with pytest.raises(DeadlockError, match=words):
        simulate(monkeypatch, tensors(40, 1, 1), [0, 40], programs=1, edits=damage)


def test_turns_order_and_guard_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "mbarrier.wait(turn.index(C), (n & 1) ^ (1 - C))\n"
    qkv, bounds = tensors(90, 2, 1), [0, 30, 90]
    edits = {"_group_step": (f"    {wait}", ""), "attention_hopper_group": (f"            {wait}", "")}
    compare(simulate(monkeypatch, qkv, bounds, edits=edits), qkv, bounds)


def test_the_public_function_differentiates_through_the_shipped_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.install()
    monkeypatch.setattr(attention_hopper, KERNEL, Simulated(attention_hopper, KERNEL))
    monkeypatch.setattr(attention_hopper, "_multiprocessors", lambda device: 2)
    leaves = [x.requires_grad_() for x in tensors(200, 2, 1, 64)]
    cu_seqlens = torch.tensor([0, 45, 200], dtype=torch.int32)
    results = []
    with dispatch.planning_for_gpu():  # lets a CPU pass for a GPU
        for impl in ("hopper", "torch"):
            out = attention(*leaves, cu_seqlens=cu_seqlens, impl=impl)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert (a.double() - b.double()).norm() < 1e-2 * b.double().norm()


def test_a_plan_with_other_tiles_is_refused() -> None:
    q = torch.randn(40, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r'make_tile_map\(\.\.\., impl="hopper"\)'):
        attention_forward_hopper(q, q, q, make_tile_map([0, 20, 40], 40, head_dim=64), Rules(True, 0, 0.0, 0.125))


def test_its_plan_has_its_tiles_and_shares_them_between_documents() -> None:
    tile_map = make_tile_map([0, 20, 40], 40, head_dim=128, impl="hopper")
    assert tile_map.config.forward == HOPPER_FORWARD[128]
    assert (tile_map.forward[:, 1] > 0).sum() == 1


def test_a_row_past_32_bits_is_refused() -> None:
    q = torch.empty(1, 1, 16, dtype=torch.bfloat16).expand((1 << 31) - 8, 1, 16)
    tile_map = make_tile_map([0, 8], 8, head_dim=16, config=KernelConfig(SMALL, UNUSED, UNUSED))
    with pytest.raises(ValueError, match="in 32 bits; got T=2147483640"):
        attention_hopper.launch(q, q, q, tile_map, Rules(True, 0, 0.0, 0.25), 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"dtype": torch.float32}, "bf16 and fp16"),
        ({"head_dim": 80, "value_dim": 80}, "head dimensions"),
        ({"value_dim": 128}, "head"),
    ],
)
def test_what_it_cannot_do_it_says(call: dict[str, Any], words: str) -> None:
    usual = {"dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64}
    assert why_not_hopper(**usual) is None
    assert words in str(why_not_hopper(**(usual | call)))


def test_without_a_gpu_it_is_refused_in_words() -> None:
    q = torch.randn(8, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="runs only on a Hopper GPU"):
        attention(q, q, q, impl="hopper")


def test_a_check_that_hangs_or_fails_is_named_and_spares_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], *, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
        if command[-1] == "one_tile":
            raise subprocess.TimeoutExpired(command, timeout)
        code = int(command[-1] == "layouts")
        return subprocess.CompletedProcess(command, code, 'warning\n{"D64": 0.001}\n', "Traceback\nAssertionError: error 1e-1")

    monkeypatch.setattr(attention_hopper_check.subprocess, "run", answer)
    assert attention_hopper_check.guarded("bitwise") == {"D64": 0.001}
    with pytest.raises(RuntimeError, match="layouts failed:\nTraceback\nAssertionError: error 1e-1"):
        attention_hopper_check.guarded("layouts")
    attention_hopper_check.why_unfit.cache_clear()
    assert "one_tile did not end within 60 s: a deadlock" in str(attention_hopper_check.why_unfit())
    attention_hopper_check.why_unfit.cache_clear()
