"""The Hopper forward on a Hopper GPU, every check in a process of its own: a deadlock costs two minutes and is named.

pytest -m gpu tests/kernels/attention/test_attention_hopper_gpu.py
"""

from collections.abc import Callable

import pytest
import torch
from tests.kernels.attention.test_attention_gpu import chats, compare, error, inputs, results

from chatmill.kernels.attention.interface import attention
from chatmill.kernels.bench.hopper_check import CHECKS, guarded, why_unfit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]


@pytest.fixture
def fit() -> None:
    """Fails at once where the least call does not end, instead of hanging in this process."""
    reason = why_unfit() or why_unfit("backward")
    if reason is not None:
        pytest.fail(reason, pytrace=False)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, fit: None, record_property: Callable[[str, object], None]) -> None:
    for what, figure in guarded(name).items():
        record_property(what, figure)
        print(f"{name} {what}: {figure:.4g}")


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("longest", [60, 700, 10_000])
def test_gradients_through_it_by_the_fused_backward(fit: None, D: int, longest: int) -> None:
    compare("hopper", 1507, (4, 2), (D, D), torch.bfloat16, cu_seqlens=chats(1507, longest))


@pytest.mark.parametrize("D", [64, 128])
def test_it_errs_at_most_twice_as_much_as_pytorch(fit: None, D: int) -> None:
    leaves = inputs(2048, (8, 2), (D, D))
    dout = torch.randn(2048, 8, D, device="cuda", dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = results(attention(*wide, impl="reference"), wide, dout)
    mine = results(attention(*leaves, impl="hopper"), leaves, dout)
    batched = [x.transpose(0, 1)[None] for x in leaves]
    theirs = torch.nn.functional.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True)
    other = results(theirs[0].transpose(0, 1), leaves, dout)
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), mine, other, truth, strict=True):
        assert error(a, t) <= 2 * error(b, t), f"{name}: {error(a, t):.2e} against {error(b, t):.2e}"


@pytest.mark.parametrize("D", [64, 128])
def test_asked_for_it_gives_bitwise_equal_gradients(fit: None, D: int) -> None:
    leaves, bounds = inputs(2048, (8, 2), (D, D)), chats(2048, 500)
    dout = torch.randn(2048, 8, D, device="cuda", dtype=torch.bfloat16)
    runs = [results(attention(*leaves, cu_seqlens=bounds, impl="hopper", deterministic=True), leaves, dout) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    other = results(attention(*leaves, cu_seqlens=bounds, impl="hopper", deterministic=False), leaves, dout)
    for name, a, b in zip(("out", "dq", "dk", "dv"), other, runs[0], strict=True):
        assert error(a, b) < 1e-2, name
