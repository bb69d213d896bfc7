"""The parts of the Triton tier: tiles, edges of every buffer, repeatability, large offsets, cross-compilation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from chatmill.kernels.cross_entropy import tiles as shapes
from chatmill.kernels.cross_entropy import triton_tier as kernels
from chatmill.kernels.cross_entropy import weight_gradient as head
from chatmill.kernels.cross_entropy.interface import linear_cross_entropy
from chatmill.kernels.cross_entropy.rows import LossOptions, finish_rows
from chatmill.kernels.interpreter import install

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SENTINEL = -777.0


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    if DEVICE.type == "cpu":
        install()


def problem(R: int, H: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(R, H, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    w = (torch.randn(V, H, generator=generator, dtype=torch.float64) * 2 / H**0.5).to(DEVICE, dtype)
    return x, w, torch.randint(0, V, (R,), generator=generator).to(DEVICE)


def fenced(rows: int, columns: int, dtype: torch.dtype, border: int = 64) -> tuple[Tensor, Tensor]:
    """(whole, inside): a matrix of sentinels and its middle, whose neighbours a kernel must not touch."""
    whole = torch.full((rows + 2, columns + 2 * border), SENTINEL, dtype=dtype, device=DEVICE)
    return whole, whole[1:-1, border:-border]


def assert_fence_untouched(whole: Tensor, inside: Tensor, border: int = 64) -> None:
    marks = torch.ones_like(whole, dtype=torch.bool)
    marks[1:-1, border:-border] = False
    assert (whole[marks] == SENTINEL).all()
    assert (inside != SENTINEL).all()


@pytest.mark.parametrize("shape", [(33, 40, 65), (45, 123, 507), (64, 32, 128), (1, 8, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_writes_its_rows_and_statistics_and_nothing_else(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, labels = problem(*shape, dtype)
    whole, logits = fenced(shape[0], shape[2], dtype)
    stats = kernels.project(x, w, labels, logits, LossOptions(0.1, 0.01, 4.0))
    assert_fence_untouched(whole, logits)
    exact = x.double() @ w.double().T
    capped = 4.0 * torch.tanh(exact / 4.0)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact, rtol=step, atol=1e-5)
    own = capped.gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(stats.own.double(), own, rtol=1e-5, atol=1e-5)
    lse, losses, hits, *_ = finish_rows(stats, shape[2], LossOptions(0.1, 0.01, 4.0))
    torch.testing.assert_close(lse.double(), capped.logsumexp(1), rtol=1e-5, atol=1e-5)
    expected = F.cross_entropy(capped, labels, reduction="none", label_smoothing=0.1) + 0.01 * capped.logsumexp(1) ** 2
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, capped.argmax(1) == labels)


def test_gradient_stays_inside_a_ragged_row() -> None:
    x, w, labels = problem(9, 16, 61)
    whole, logits = fenced(9, 61, torch.float32)
    stats = kernels.project(x, w, labels, logits, LossOptions())
    rows = finish_rows(stats, 61, LossOptions())
    coefficients = torch.ones(9, device=DEVICE)
    coefficients[3] = 0.0
    kernels.to_gradient(logits, 61, labels, stats.own, rows, coefficients, LossOptions())
    assert_fence_untouched(whole, logits)
    exact = (x.double() @ w.double().T).requires_grad_()
    (F.cross_entropy(exact, labels, reduction="none") * coefficients).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert not logits[3].any()


@pytest.mark.parametrize("shape", [(33, 40, 65), (70, 123, 127), (5, 8, 3)], ids=str)
def test_accumulation_adds_to_what_is_there_and_touches_nothing_else(shape: tuple[int, int, int]) -> None:
    R, H, V = shape
    g, x = torch.randn(R, V, device=DEVICE), torch.randn(R, H, device=DEVICE)
    flat = torch.full((V * H + 128,), SENTINEL, device=DEVICE)
    total = flat[64:-64].view(V, H)
    total.fill_(2.0)
    head.accumulate(total, g, x)
    torch.testing.assert_close(total.double(), 2.0 + g.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert (flat[:64] == SENTINEL).all() and (flat[-64:] == SENTINEL).all()


def test_halves_of_fp32_sums_hold_exactly_what_whole_ones_do() -> None:
    """A bf16 head's sums over three chunks: upper halves in the result, lower ones beside it, rounded once at the end."""
    chunks = [(torch.randn(33, 65, device=DEVICE), torch.randn(33, 41, device=DEVICE)) for _ in range(3)]
    whole = torch.empty(65, 41, device=DEVICE)
    flat = torch.full((65 * 41 + 128,), SENTINEL, dtype=torch.bfloat16, device=DEVICE)
    high, low = flat[64:-64].view(65, 41), torch.full((65, 41), -1, dtype=torch.int16, device=DEVICE)
    for i, (g, x) in enumerate(chunks):
        head.accumulate(whole, g, x, first=i == 0)
        head.accumulate(high, g, x, low, first=i == 0, last=i == 2)
        if i < 2:
            bits = high.view(torch.int16).int() << 16 | low.int() & 0xFFFF
            assert torch.equal(bits.view(torch.float32), whole)
    assert torch.equal(high, whole.bfloat16())
    assert (flat[:64] == SENTINEL).all() and (flat[-64:] == SENTINEL).all()


def test_aligned_rows_by_descriptors_and_ragged_rows_by_pointers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, labels = problem(45, 40, 507, torch.bfloat16)
    assert shapes.has_descriptors(x, w) and not shapes.has_descriptors(x[:, :39].contiguous(), w)
    results = []
    for described in (True, False):
        monkeypatch.setattr(shapes, "has_descriptors", lambda *_, d=described: d)
        logits = shapes.logits_buffer(45, 507, x)
        stats = kernels.project(x, w, labels, logits, LossOptions())
        total = torch.zeros(507, 40, device=DEVICE)
        head.accumulate(total, logits[:, :507], x)
        results.append((logits[:, :507], stats.tile_max, stats.tile_sum, stats.own, total))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tile", sorted({*shapes.UNALIGNED, *shapes.INTERPRETED}, key=str), ids=str)
def test_every_small_tile_of_the_tables_computes_the_same(tile: shapes.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "tiles", lambda *_: (tile, tile))
    x, w, labels = problem(70, 40, 137)
    a, b = x.requires_grad_(), w.requires_grad_()
    linear_cross_entropy(a, b, labels, impl="triton").backward()
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    F.cross_entropy(x64 @ w64.T, labels).backward()
    for got, exact in ((a.grad, x64.grad), (b.grad, w64.grad)):
        assert got is not None and exact is not None
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)


def test_the_shipped_hopper_tile_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    row = shapes.row_for(90, 2)
    monkeypatch.setattr(shapes, "tiles", lambda *_: (row.project, row.accumulate))
    x, w, labels = problem(130, 72, 300, torch.bfloat16)
    stats = kernels.project(x, w, labels, None, LossOptions())
    lse, losses, *_ = finish_rows(stats, 300, LossOptions())
    exact = x.double() @ w.double().T
    torch.testing.assert_close(lse.double(), exact.logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.double(), F.cross_entropy(exact, labels, reduction="none"), rtol=1e-5, atol=1e-5)
    total = torch.zeros(300, 72, device=DEVICE)
    g = exact.bfloat16()
    head.accumulate(total, g, x)
    torch.testing.assert_close(total.double(), g.double().T @ x.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("products", ["triton", "torch"])
def test_results_are_bitwise_repeatable(products: Any) -> None:
    x, w, labels = problem(70, 40, 300, torch.bfloat16)
    runs = []
    for _ in range(2):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = linear_cross_entropy(a, b, labels, impl="triton", products=products)
        loss.backward()
        runs.append((loss.detach(), a.grad, b.grad))
    for first, second in zip(*runs, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


def test_offsets_beyond_32_bits_reach_the_right_memory() -> None:
    """Rows 2**30 elements apart: row 3 starts at 3 * 2**30 > 2**31. Only the touched pages of the buffer exist."""
    R, H, V, stride = 4, 16, 61, 1 << 30
    if DEVICE.type == "cpu":
        try:
            store = torch.empty((R - 1) * stride + V, dtype=torch.bfloat16)
        except RuntimeError:
            pytest.fail("7 GiB of virtual memory could not be reserved")
    else:
        store = torch.empty((R - 1) * stride + V, dtype=torch.bfloat16, device=DEVICE)
    logits = store.as_strided((R, V), (stride, 1))
    x, w, labels = problem(R, H, V, torch.bfloat16)
    stats = kernels.project(x, w, labels, logits, LossOptions())
    exact = x.double() @ w.double().T
    torch.testing.assert_close(logits.double(), exact, rtol=8e-3, atol=1e-5)
    rows = finish_rows(stats, V, LossOptions())
    kernels.to_gradient(logits, V, labels, stats.own, rows, torch.ones(R, device=DEVICE), LossOptions())
    softmax = exact.softmax(1) - F.one_hot(labels, V)
    torch.testing.assert_close(logits.double(), softmax, rtol=2e-2, atol=1e-3)
    total = torch.zeros(V, H, device=DEVICE)
    head.accumulate(total, logits, x)
    torch.testing.assert_close(total.double(), logits.double().T @ x.double(), rtol=1e-4, atol=1e-4)


def test_the_chunk_holds_the_promised_memory() -> None:
    budget = shapes.row_for(90, 2).logits_bytes
    rows = shapes.chunk_rows(100_000, 128_256, 2)
    assert rows * 128_256 * 2 <= budget < (rows + 256) * 128_256 * 2 and rows % 128 == 0
    assert shapes.chunk_rows(2432, 128_256, 2) == 1280, "two chunks of one size, not 2304 rows and 128"
    assert shapes.chunk_rows(100_000, 50_000_000, 2) == 128
    assert shapes.chunk_rows(300, 128_256, 2) == 300
    assert shapes.chunk_rows(8192, 1000, 2) == shapes.CHUNK_ROWS


def test_tuning_keeps_the_fastest_tile_and_the_smallest_chunk_as_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "ROWS", list(shapes.ROWS))
    wanted = shapes.Tile(*shapes.CANDIDATES[2])

    def measure() -> float:
        row = shapes.row_for(90, 2)
        built = float("inf") if row.accumulate == shapes.CANDIDATES[1] else 0.0
        return built + (5.0 if row.project == wanted else 8.0) + (1.0 if row.logits_bytes < 300_000_000 else 0.0)

    shapes.tune(measure, 90, 60.0, "a GPU", tmp_path / "table.json")
    written = json.loads((tmp_path / "table.json").read_text())
    assert [row["arch"] for row in written] == [list(row.arch) for row in shapes.ROWS]
    (row,) = (row for row in written if row["timed"])
    assert (row["project"], row["logits_bytes"]) == (list(wanted), 300_000_000) and "a GPU" in row["timed"]
    assert row["arch"] == [90, 99] and row["accumulate"] != list(shapes.CANDIDATES[1])


def test_no_tensor_as_large_as_all_logits_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "chunk_rows", lambda *_: 16)
    made = []
    buffer = shapes.logits_buffer
    monkeypatch.setattr(shapes, "logits_buffer", lambda n, v, like: made.append((n, v)) or buffer(n, v, like))
    x, w, labels = problem(70, 16, 300)
    linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), labels, impl="triton").backward()
    assert made == [(16, 300)]
    made.clear()
    with torch.no_grad():
        linear_cross_entropy(x, w, labels, impl="triton")
    assert made == [], "the loss-only path stores no logits"


def test_a_ragged_vocabulary_is_stored_and_rewritten_in_whole_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels are told of columns that come in sixteens: told of 61, each access of a lane would be one of 2 bytes."""
    told = []

    class Recorder:
        def __init__(self, kernel: Any, argument: str) -> None:
            self.kernel, self.argument = kernel, argument

        def __getitem__(self, grid: Any) -> Any:
            def launch(*values: Any, **constants: Any) -> None:
                told.append(values[list(self.kernel.arg_names).index(self.argument)])
                self.kernel[grid](*values, **constants)

            return launch

    monkeypatch.setattr(kernels, "cross_entropy_project_kernel", Recorder(kernels.cross_entropy_project_kernel, "n_stored"))
    monkeypatch.setattr(kernels, "cross_entropy_gradient_kernel", Recorder(kernels.cross_entropy_gradient_kernel, "n_columns"))
    x, w, labels = problem(9, 16, 61, torch.bfloat16)
    linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), labels, impl="triton").backward()
    assert told == [128, 128]
