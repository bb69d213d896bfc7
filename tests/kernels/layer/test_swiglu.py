"""SwiGLU against the formula in fp64: value, both gradients, strides."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatmill.kernels.layer.geglu import geglu, geglu_reference
from chatmill.kernels.layer.swiglu import _swiglu_op, swiglu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENGINES = ["torch", "triton", "reference"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3).to(DEVICE, dtype)


def error(got: Tensor | None, expected: Tensor | None) -> float:
    assert got is not None and expected is not None
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(37, 123), (2, 5, 507), (1, 1), (3, 4096)], ids=str)
def test_value_and_both_gradients_equal_the_formula(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up, upstream = (random(*shape, seed=i, dtype=dtype) for i in range(3))
    a, b = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = swiglu(a, b, impl=impl)
    y.backward(upstream)
    a64, b64 = gate.double().requires_grad_(), up.double().requires_grad_()
    y64 = F.silu(a64) * b64
    y64.backward(upstream.double())
    assert y.dtype == dtype
    for got, exact in ((y, y64), (a.grad, a64.grad), (b.grad, b64.grad)):
        assert error(got, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_halves_of_one_projection_and_slanted_gradients_are_read_as_they_lie(impl: str) -> None:
    fused, slanted = random(9, 2 * 123, seed=0, dtype=torch.float64), random(123, 9, seed=1, dtype=torch.float64)
    leaf, leaf64 = fused.clone().requires_grad_(), fused.clone().requires_grad_()
    y, exact = swiglu(*leaf.chunk(2, 1), impl=impl), F.silu(leaf64[:, :123]) * leaf64[:, 123:]
    (y.T * slanted).sum().backward()
    exact.T.backward(slanted)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(leaf.grad, leaf64.grad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_extreme_gates_stay_finite(impl: str) -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4]], device=DEVICE, requires_grad=True)
    up = torch.ones_like(gate).requires_grad_()
    y = swiglu(gate, up, impl=impl)
    y.sum().backward()
    torch.testing.assert_close(y, F.silu(gate))
    assert gate.grad is not None and gate.grad.isfinite().all() and up.grad is not None and up.grad.isfinite().all()


def test_backward_may_run_twice_and_operator_passes_torchs_own_checks() -> None:
    gate, up = (random(9, 123, seed=i, dtype=torch.float32).requires_grad_() for i in range(2))
    loss = swiglu(gate, up, impl="triton").square().sum()
    first = torch.autograd.grad(loss, (gate, up), retain_graph=True)
    second = torch.autograd.grad(loss, (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.library.opcheck(_swiglu_op, (gate, up))


def test_misuse_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(torch.zeros(3, 8), torch.zeros(3, 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_geglu_and_its_gradients_follow_the_formula(dtype: torch.dtype) -> None:
    parts = [torch.randn(7, 123, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    results = []
    for function in (geglu, geglu_reference):
        gate, up = (part.clone().requires_grad_() for part in parts[:2])
        out = function(gate, up)
        out.backward(parts[2])
        results.append((out.detach(), gate.grad, up.grad))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for got, expected in zip(*results, strict=True):
        assert got is not None and expected is not None
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="one shape and dtype"):
        geglu(parts[0], parts[1][:, :5])
