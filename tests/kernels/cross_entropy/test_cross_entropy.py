"""Cross-entropy on given logits, out of place and in place, against F.cross_entropy in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatmill.kernels.cross_entropy.logits import cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = ["torch", "triton"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def problem(dtype: torch.dtype, N: int = 23, V: int = 507) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 3).to(DEVICE, dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::4] = -100
    return logits, targets.to(DEVICE)


def truth(logits: Tensor, targets: Tensor, softcap: float | None, label_smoothing: float, z_loss: float) -> Tensor:
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    losses = F.cross_entropy(z, targets, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * z.logsumexp(1) ** 2 * (targets != -100)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [(None, 0.0, 0.0), (5.0, 0.1, 1e-2)], ids=str)
def test_loss_and_gradient_equal_pytorchs(impl: str, dtype: torch.dtype, inplace: bool, options: Any) -> None:
    logits, targets = problem(dtype)
    softcap, smoothing, z_loss = options
    leaf = logits.clone().requires_grad_()
    loss, metrics = cross_entropy(
        leaf * 1, targets, softcap=softcap, label_smoothing=smoothing, z_loss=z_loss, inplace=inplace, impl=impl
    )
    (loss * 3).backward()
    exact = logits.double().requires_grad_()
    expected = truth(exact, targets, *options).sum() / (targets != -100).sum()
    (expected * 3).backward()
    assert leaf.grad is not None and exact.grad is not None
    assert error(loss.detach(), expected.detach()) <= max(1e-6, TOLERANCE[dtype]) / 10
    assert error(leaf.grad, exact.grad) <= TOLERANCE[dtype]
    assert metrics.count == (targets != -100).sum()
    assert not leaf.grad[targets == -100].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_reduction_none_gives_every_token_its_own_gradient(impl: str) -> None:
    logits, targets = problem(torch.float64)
    leaf, exact = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    upstream = torch.arange(23, dtype=torch.float64, device=DEVICE)
    cross_entropy(leaf, targets, reduction="none", impl=impl)[0].backward(upstream)
    F.cross_entropy(exact, targets, reduction="none").backward(upstream)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_token_weights_sum_and_a_global_normaliser_in_place_too(impl: str, inplace: bool, reduction: str) -> None:
    logits, targets = problem(torch.float64)
    weights = torch.linspace(0, 2, 23, dtype=torch.float64, device=DEVICE)
    leaf, exact = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    divisor = 7.0 if reduction == "mean" else None
    options: dict[str, Any] = {"reduction": reduction, "normalizer": divisor, "inplace": inplace, "impl": impl}
    loss, _ = cross_entropy(leaf * 1, targets, token_weights=weights, **options)
    loss.backward()
    expected = (F.cross_entropy(exact, targets, reduction="none") * weights).sum() / (divisor or 1.0)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_an_ignored_row_holds_reaches_nothing(impl: str, reduction: str) -> None:
    logits, targets = problem(torch.float32)
    logits[0], logits[4] = float("nan"), float("inf")
    assert targets[0] == targets[4] == -100
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf, targets, reduction=reduction, impl=impl)[0].sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[targets == -100].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_in_place_uses_the_logits_memory_and_protects_the_graph(impl: str) -> None:
    logits, targets = problem(torch.float32)
    leaf = logits.clone().requires_grad_()
    z = leaf * 1
    loss, _ = cross_entropy(z, targets, inplace=True, impl=impl)
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    torch.testing.assert_close(z.detach(), leaf.grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="inplace=False"):
        loss.backward()
    z = torch.exp(leaf)  # exp needs its result in backward, and cross_entropy overwrites it
    loss, _ = cross_entropy(z, targets, inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_transposed_view_of_logits_is_read_and_written_as_it_lies(impl: str) -> None:
    logits, targets = problem(torch.float64)
    for inplace in (False, True):
        leaf, exact = logits.T.clone().requires_grad_(), logits.clone().requires_grad_()
        cross_entropy((leaf * 1).T, targets, inplace=inplace, impl=impl)[0].backward()
        F.cross_entropy(exact, targets).backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.T, exact.grad, rtol=1e-10, atol=1e-12)


def test_misuse_is_refused_in_words() -> None:
    logits, targets = problem(torch.float32)
    with pytest.raises(ValueError, match="inplace=False"):
        cross_entropy(logits, targets, inplace=True, reduction="none")
    with pytest.raises(ValueError, match="normalizer divides a mean"):
        cross_entropy(logits, targets, reduction="sum", normalizer=2.0)
    with pytest.raises(ValueError, match=r"token_weights of shape"):
        cross_entropy(logits, targets, token_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5"):
        cross_entropy(logits, targets, label_smoothing=1.5)
