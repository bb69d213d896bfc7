"""RMSNorm and its residual form against the formula in fp64: values, every gradient, strides, edges."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatmill.kernels.layer import rms_norm as rms_norm_module
from chatmill.kernels.layer import rms_norm_triton
from chatmill.kernels.layer.rms_norm import _norm_op, rms_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENGINES = ["torch", "triton", "reference"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHAPES = [(37, 123), (5, 507), (1, 1), (3, 7, 64), (2, 2, 9, 576)]


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def error(got: Tensor | None, expected: Tensor | None) -> float:
    assert got is not None and expected is not None
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def truth(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_both_gradients_equal_the_formula(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, w = random(*shape, seed=0, dtype=dtype), random(shape[-1], seed=1, dtype=dtype)
    upstream = random(*shape, seed=2, dtype=dtype)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = rms_norm(a, b, 1e-5, impl=impl)
    y.backward(upstream)
    a64, b64 = x.double().requires_grad_(), w.double().requires_grad_()
    y64 = truth(a64, b64, 1e-5)
    y64.backward(upstream.double())
    assert y.dtype == dtype and a.grad is not None and a.grad.dtype == dtype
    assert error(y, y64) <= TOLERANCE[dtype]
    if shape[-1] > 1:  # one channel: y is w times a sign, its gradient nothing but rounding
        assert error(a.grad, a64.grad) <= TOLERANCE[dtype]
    assert error(b.grad, b64.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", ["both", "only the norm", "only the stream"])
def test_residual_form_carries_the_streams_gradient(impl: str, dtype: torch.dtype, used: str) -> None:
    x, r, w = (random(*s, seed=i, dtype=dtype) for i, s in enumerate([(9, 123), (9, 123), (123,)]))
    g_y, g_h = random(9, 123, seed=3, dtype=dtype), random(9, 123, seed=4, dtype=dtype)
    results = []
    for wide, name in ((dtype, impl), (torch.float64, "")):
        a, b, c = (t.to(wide, copy=True).requires_grad_() for t in (x, r, w))
        y, h = rms_norm(a, c, 1e-5, b, impl=name) if name else (truth(a + b, c, 1e-5), a + b)
        zero = y.sum() * 0
        (zero + (y * g_y * (used != "only the stream")).sum() + (h * g_h * (used != "only the norm")).sum()).backward()
        results.append((y, h, a.grad, b.grad, *(() if used == "only the stream" else (c.grad,))))
    for got, exact in zip(*results, strict=True):
        assert error(got, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_weight_always_gets_its_gradient(impl: str) -> None:
    """unsloth issue 4533: the norm's weight came back with grad None."""
    x, w = random(9, 64, seed=0, dtype=torch.float32), random(64, seed=1, dtype=torch.float32)
    for x_needs in (True, False):
        b = w.clone().requires_grad_()
        rms_norm(x.clone().requires_grad_(x_needs), b, impl=impl).sum().backward()
        b64 = w.double().requires_grad_()
        truth(x.double(), b64, 1e-6).sum().backward()
        assert b.grad is not None and error(b.grad, b64.grad) < 1e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strided_inputs_and_gradients_are_read_as_they_lie(impl: str) -> None:
    """unsloth issue 10617: a gradient that arrives as a view (transposed, expanded, sliced) was read as if contiguous."""
    fused, w = random(9, 3 * 64, seed=0, dtype=torch.float64), random(128, seed=1, dtype=torch.float64)
    slanted = random(64, 9, seed=2, dtype=torch.float64)
    leaf, b = fused.clone().requires_grad_(), w.clone().requires_grad_()
    leaf64, b64 = fused.clone().requires_grad_(), w.clone().requires_grad_()
    ys = (rms_norm(leaf[:, 64:128], b[::2], impl=impl), truth(leaf64[:, 64:128], b64[::2], 1e-6))
    torch.testing.assert_close(*ys)
    for y in ys:
        (y.T * slanted).sum().backward(retain_graph=True)
        y.mean(0).sum().backward(retain_graph=True)  # expanded: stride 0
        y[:, ::2].cumsum(1).sum().backward()
    torch.testing.assert_close(leaf.grad, leaf64.grad)
    torch.testing.assert_close(b.grad, b64.grad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_backward_may_run_twice(impl: str) -> None:
    x = random(9, 64, seed=0, dtype=torch.float64).requires_grad_()
    w = random(64, seed=1, dtype=torch.float64).requires_grad_()
    loss = rms_norm(x, w, impl=impl).square().sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_all_zero_row_has_no_nan(impl: str) -> None:
    x = torch.zeros(4, 64, device=DEVICE, requires_grad=True)
    w = torch.ones(64, device=DEVICE, requires_grad=True)
    rms_norm(x, w, 1e-6, impl=impl).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and w.grad is not None and not w.grad.any()


def test_weight_gradient_of_many_rows_is_repeatable_and_summed_wide() -> None:
    x = random(500, 64, seed=0, dtype=torch.bfloat16) + 1
    w = torch.ones(64, device=DEVICE, dtype=torch.bfloat16)
    grads = []
    for _ in range(2):
        b = w.clone().requires_grad_()
        rms_norm(x, b, impl="triton").sum().backward()
        grads.append(b.grad)
    b64 = w.double().requires_grad_()
    truth(x.double(), b64, 1e-6).sum().backward()
    assert grads[0] is not None and torch.equal(grads[0], grads[1])
    assert error(grads[0], b64.grad) < 3e-3


def test_kernels_touch_nothing_beyond_their_rows() -> None:
    """Three rows of 123 in the middle of a larger buffer, whose row stride is 128."""
    pytest.importorskip("triton")
    from chatmill.kernels.layer import rms_norm_triton

    whole = torch.full((5, 128), float("nan"), device=DEVICE)
    whole[1:4, :123] = random(3, 123, seed=0, dtype=torch.float32)
    x, w = whole[1:4, :123], random(123, seed=1, dtype=torch.float32)
    y, _, scale = rms_norm_triton.forward(x, w, None, 1e-6)
    d_x, d_w = rms_norm_triton.backward(x, w, scale, x, None, True, True)
    assert y.isfinite().all() and d_x.isfinite().all() and d_w.isfinite().all()
    torch.testing.assert_close(y, truth(x, w, 1e-6))


def test_operator_passes_torchs_own_checks() -> None:
    x, w = random(9, 64, seed=0, dtype=torch.float32).requires_grad_(), random(64, seed=1, dtype=torch.float32).requires_grad_()
    r = random(9, 64, seed=2, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(_norm_op, (x, w, None, 1e-6))
    torch.library.opcheck(_norm_op, (x, w, r, 1e-6))


def test_compiled_code_gives_the_eager_result() -> None:
    x, w = random(9, 64, seed=0, dtype=torch.float32), random(64, seed=1, dtype=torch.float32)
    for impl in ("torch", "triton"):
        grads = []
        for compiled in (False, True):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()

            def run(a: Tensor, b: Tensor, impl: str = impl) -> Tensor:
                return (rms_norm(a * 2, b, impl=impl) ** 2).sum()

            (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(a, b).backward()
            grads.append((a.grad, b.grad))
        torch.testing.assert_close(grads[0], grads[1])


def test_misuse_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"weight \(H,\)"):
        rms_norm(torch.zeros(3, 8), torch.zeros(9))
    with pytest.raises(ValueError, match="residual of shape"):
        rms_norm(torch.zeros(3, 8), torch.zeros(8), 1e-6, torch.zeros(3, 9))
    with pytest.raises(ValueError, match="does not fit one tile"):
        rms_norm(torch.zeros(1, 40_000, device=DEVICE), torch.zeros(40_000, device=DEVICE), impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [64, 2048, 8192, rms_norm_module.MAX_WIDTH])
def test_the_tiles_on_their_way_fit_every_gpus_shared_memory(width: int, dtype: torch.dtype) -> None:
    rows, block, _ = rms_norm_triton._tile(width)
    tile = 3 * rows * block * dtype.itemsize  # h, dy, dh
    stages = rms_norm_triton._stages(tile)
    assert stages >= 1 and (stages - 1) * tile <= 98_304
    assert stages == 3 or stages * tile > 98_304, "no stage is given away"
