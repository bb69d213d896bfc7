"""The Hopper tier: its kernel interpreted, against the fp64 reference; never chosen by itself."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from chatmill.kernels import interpreter
from chatmill.kernels.attention import attention, attention_reference
from chatmill.kernels.attention_config import plan_attention
from chatmill.kernels.attention_hopper import attention_forward_hopper, why_not_hopper

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = torch.device("cuda" if ON_HOPPER else "cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a Hopper GPU, or none")


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    if DEVICE.type == "cpu":
        interpreter.install()


@pytest.mark.parametrize("bounds", [[0, 150], [0, 7, 9, 100, 140]])
@pytest.mark.parametrize("window", [None, 33])
def test_the_forward_equals_the_reference(bounds: list[int], window: int | None) -> None:
    torch.manual_seed(0)
    T = 150
    q, k, v = (torch.randn(T, h, 64, dtype=torch.bfloat16, device=DEVICE) for h in (2, 1, 1))
    plan = plan_attention(bounds, T, head_dim=64, window=window, impl="hopper", device=DEVICE).to(DEVICE)
    out, lse = attention_forward_hopper(q, k, v, plan, 0.125)
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    expected, expected_lse = attention_reference(*(x.double() for x in (q, k, v)), cu_seqlens=cu_seqlens, window=window)
    assert (out.double() - expected).norm() < 5e-3 * expected.norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    assert (out[bounds[-1] :] == 0).all()


def test_the_public_function_differentiates_through_it() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(60, h, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for h in (2, 1, 1)]
    cu_seqlens = torch.tensor([0, 25, 60], dtype=torch.int32, device=DEVICE)
    grads = []
    for impl in ("hopper", "triton"):
        out = attention(*leaves, cu_seqlens=cu_seqlens, impl=impl)
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for a, b in zip(*grads, strict=True):
        assert (a.double() - b.double()).norm() < 1e-2 * b.double().norm()


def test_a_plan_whose_tiles_share_documents_is_refused() -> None:
    q = torch.randn(40, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    plan = plan_attention([0, 20, 40], 40, head_dim=64, device=DEVICE).to(DEVICE)
    with pytest.raises(ValueError, match=r'plan_attention\(\.\.\., impl="hopper"\)'):
        attention_forward_hopper(q, q, q, plan, 0.125)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"dtype": torch.float32}, "bf16 and fp16"),
        ({"head_dim": 80, "value_dim": 80}, "head dimensions"),
        ({"softcap": 5.0}, "no soft-cap"),
        ({"causal": False}, "causal"),
    ],
)
def test_what_it_cannot_do_it_says(call: dict[str, Any], words: str) -> None:
    usual = {"dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64, "softcap": 0.0, "causal": True}
    assert why_not_hopper(**usual) is None
    assert words in str(why_not_hopper(**(usual | call)))
