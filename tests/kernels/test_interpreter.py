"""The interpreter's bf16 after `install()`, against torch's own bf16 arithmetic."""

import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from chatmill.kernels import interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture(autouse=True)
def _installed() -> None:
    interpreter.install()


@triton.jit
def arithmetic_kernel(A, B, SUM, PRODUCT, LARGER, COMPARED, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(A + i), tl.load(B + i)
    tl.store(SUM + i, a + b)
    tl.store(PRODUCT + i, a * b)
    tl.store(LARGER + i, tl.maximum(a, b))
    tl.store(COMPARED + i, (a > b).to(tl.int32))


@triton.jit
def dot_kernel(A, B, C, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)))


@triton.jit
def cast_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(tl.bfloat16))


@triton.jit
def reduce_kernel(X, TOTAL, TOP, N: tl.constexpr):
    x = tl.load(X + tl.arange(0, N))
    tl.store(TOTAL, tl.sum(x, 0))
    tl.store(TOP, tl.max(x, 0))


@triton.jit
def descriptor_add_kernel(X, OUT, ROWS, COLUMNS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    out = tl.make_tensor_descriptor(OUT, [ROWS, COLUMNS], [COLUMNS, 1], [N, N])
    out.atomic_add([tl.program_id(0) * 4 - 4, 8], x)


def test_adding_through_a_descriptor_stops_at_its_edges() -> None:
    x, out = torch.randn(16, 16), torch.ones(24, 24)
    # four programs, each 4 rows further down, from 4 rows above the first; rows from 10 on are not the descriptor's
    descriptor_add_kernel[(4,)](x, out, 10, COLUMNS=24, N=16)
    expected = torch.ones(24, 24)
    for first in (-4, 0, 4, 8):
        rows = range(max(first, 0), min(first + 16, 10))
        expected[rows.start : rows.stop, 8:] += x[rows.start - first : rows.stop - first]
    torch.testing.assert_close(out, expected)


def test_bf16_arithmetic_equals_torch() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(64, dtype=torch.bfloat16) for _ in range(2))
    total, product, larger = (torch.empty_like(a) for _ in range(3))
    compared = torch.empty(64, dtype=torch.int32)
    arithmetic_kernel[(1,)](a, b, total, product, larger, compared, N=64)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(larger, torch.maximum(a, b))
    assert torch.equal(compared, (a > b).int())


def test_bf16_dot_accumulates_in_float32() -> None:
    torch.manual_seed(1)
    a, b = (torch.randn(32, 32, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_casting_to_bf16_rounds_to_nearest_even() -> None:
    special = [1.00390625, 1.01171875, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40]
    x = torch.cat([torch.randn(56), torch.tensor(special)])
    y = torch.empty(64, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=64)
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


def test_bf16_reductions_see_values_not_bits() -> None:
    x = torch.tensor([-3.0, 1.0, 2.5, -0.5] * 4, dtype=torch.bfloat16)
    total, top = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, total, top, N=16)
    assert total.item() == 0.0
    assert top.item() == 2.5


def test_bit_conversions_are_inverse() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = interpreter.bf16_bits_to_float32(bits)
    back = interpreter.float32_to_bf16_bits(values)
    number = ~np.isnan(values)
    assert np.array_equal(back[number], bits[number])
    assert np.isnan(interpreter.bf16_bits_to_float32(back[~number])).all()


def test_a_late_switch_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        interpreter.install()
    assert "triton" in sys.modules
