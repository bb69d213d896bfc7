"""The fused linear cross-entropy against F.cross_entropy on all logits in fp64: every option, implementation and gradient.

On a machine without a GPU the Triton kernels run interpreted; with one, compiled.
"""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chatmill.kernels import cross_entropy as loss_functions
from chatmill.kernels.cross_entropy import LossMetrics, torch_products
from chatmill.kernels.cross_entropy import operators as module
from chatmill.kernels.cross_entropy import tiles as shapes
from chatmill.kernels.cross_entropy.logits import cross_entropy
from chatmill.kernels.cross_entropy.rows import VocabularyShard, known_labels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BY_TORCH = "triton, products by torch"  # the Triton tier's other form; a name of this file
OURS = ["torch", "triton", BY_TORCH]
IMPLEMENTATIONS = [*OURS, "reference"]
# ||error|| / ||truth|| of a gradient; losses are sums in fp32 of logits that only the CPU's own bf16 product rounds
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(45, 123, 507), (64, 32, 128), (7, 16, 1000), (3, 8, 2), (130, 40, 65)]  # (N, H, V)


def linear_cross_entropy(*args: Any, impl: Any = "auto", **options: Any) -> Tensor:
    """The public function."""
    form: dict[str, Any] = {"impl": "triton", "products": "torch"} if impl == BY_TORCH else {"impl": impl}
    return loss_functions.linear_cross_entropy(*args, **form, **options)


def linear_cross_entropy_with_metrics(*args: Any, **options: Any) -> tuple[Tensor, LossMetrics]:
    loss, metrics = linear_cross_entropy(*args, return_metrics=True, **options)
    return loss, metrics


def problem(N: int, H: int, V: int, dtype: torch.dtype, seed: int = 0, ignored: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    weight = (torch.randn(V, H, generator=generator, dtype=torch.float64) * 2 / H**0.5).to(DEVICE, dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return hidden, weight, targets.to(DEVICE)


def truth(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | None = None,
) -> Tensor:
    """The same loss by PyTorch's own cross-entropy on all logits."""
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    valid = (targets != -100).to(losses.dtype)
    losses = losses + z_loss * logits.logsumexp(1) ** 2 * valid
    if token_weights is not None:
        losses = losses * token_weights
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (normalizer or valid.sum())


def leaves(hidden: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    a, b = (t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight))
    return a, b


def upstream(loss: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss.device, loss.dtype)


def error(got: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm().item()
    return (got.double() - expected.double()).norm().item() / (scale or 1.0)


def assert_equal_to_truth(hidden: Tensor, weight: Tensor, targets: Tensor, impl: str, **options: Any) -> None:
    """Loss and both gradients against `truth` in fp64 on the same (already rounded) inputs."""
    x, w = leaves(hidden, weight)
    own = {name: value for name, value in options.items() if name != "rows"}
    loss = linear_cross_entropy(x, w, targets, impl=impl, **options)
    loss.backward(upstream(loss))
    x64, w64 = leaves(hidden, weight, torch.float64)
    expected = truth(x64, w64, targets, **own)
    expected.backward(upstream(loss).double())
    assert x.grad is not None and w.grad is not None and x64.grad is not None and w64.grad is not None
    assert x.grad.dtype == hidden.dtype and w.grad.dtype == weight.dtype
    assert error(loss.detach(), expected.detach()) <= LOSS_TOLERANCE[hidden.dtype]
    assert error(x.grad, x64.grad) <= GRADIENT_TOLERANCE[hidden.dtype]
    assert error(w.grad, w64.grad) <= GRADIENT_TOLERANCE[hidden.dtype]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"normalizer": 7.0},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 3.0},
    {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 1e-2, "reduction": "none"},
    {"label_smoothing": 1.0},
    {"softcap": 30.0, "label_smoothing": 0.05, "z_loss": 1e-4, "normalizer": 11.0},
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_cross_entropy_of_all_logits_in_float64(impl: str, options: dict[str, Any]) -> None:
    assert_equal_to_truth(*problem(45, 24, 123, torch.float64), impl, **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_vocabulary_and_width_are_exact_to_the_edge(impl: str, shape: tuple[int, int, int]) -> None:
    assert_equal_to_truth(*problem(*shape, torch.float64), impl)


def test_vocabulary_slices_of_the_loss_alone_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tiles in slices of two: each target lies in one slice, beyond the end of another, or in none."""
    monkeypatch.setattr("chatmill.kernels.cross_entropy.row_statistics.BLOCK", 64)
    monkeypatch.setattr(torch_products, "SLICE_BYTES", 12 * 128 * 8)
    hidden, weight, targets = problem(12, 24, 8 * 64 + 9, torch.float64, ignored=0.0)
    targets[3], targets[4], targets[5] = 520, 512, 511
    wide, products = [], torch_products.wide_product
    monkeypatch.setattr(torch_products, "wide_product", lambda a, b: wide.append(b.shape[1]) or products(a, b))
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01}
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, impl=BY_TORCH, **options)
    torch.testing.assert_close(loss, truth(hidden, weight, targets, **options), rtol=1e-12, atol=0)
    assert wide == [128, 128, 128, 128, 9]


def test_the_shipped_table_chooses_who_multiplies_and_the_caller_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a GPU has timed both, the Triton tier's own kernels do."""
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    assert {row.products for row in shapes.ROWS} == {"triton"}
    monkeypatch.setattr(shapes, "ROWS", [dataclasses.replace(row, products="torch") for row in shapes.ROWS])
    assert [shapes.products(asked, x) for asked in ("auto", "triton", "torch")] == ["torch", "triton", "torch"]


NO_SUCH_TOKEN = [-1, -99, -(2**33), 65, 66, 127, 128, 2**31, 2**32 + 3, 2**33]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"label_smoothing": 1.0}, {"softcap": 3.0}], ids=str
)
def test_a_target_outside_the_vocabulary_has_an_infinite_loss(impl: str, options: dict[str, Any]) -> None:
    """V = 65: the last tile of a kernel also holds columns 65 to 127, and 2**32 + 3 is 3 in 32 bits."""
    hidden, weight, targets = problem(len(NO_SUCH_TOKEN) + 4, 16, 65, torch.float32, ignored=0.0)
    targets[1 : 1 + len(NO_SUCH_TOKEN)] = torch.tensor(NO_SUCH_TOKEN)
    targets[-1] = -100
    bad = torch.zeros(len(targets), dtype=torch.bool)
    bad[1 : 1 + len(NO_SUCH_TOKEN)] = True
    a, b = leaves(hidden, weight)
    losses, metrics = linear_cross_entropy_with_metrics(a, b, targets, reduction="none", impl=impl, **options)
    assert (losses.isposinf() == bad).all() and losses[-1] == 0
    expected = truth(hidden[~bad], weight, targets[~bad], reduction="none", **options)
    torch.testing.assert_close(losses[~bad].detach(), expected, rtol=1e-5, atol=1e-5)
    assert linear_cross_entropy(a, b, targets, impl=impl, **options).isposinf()
    assert int(metrics.correct) <= 3


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("label", [-7, 65, 100, 2**33])
def test_given_logits_have_an_infinite_loss_there_too_and_a_shard_knows_no_such_token(impl: str, label: int) -> None:
    logits, targets = torch.randn(4, 65, device=DEVICE), torch.tensor([3, label, 64, -100], device=DEVICE)
    losses, _ = cross_entropy(logits, targets, reduction="none", impl=impl)
    assert losses.isposinf().tolist() == [False, True, False, False]
    valid = targets != -100
    assert VocabularyShard(65, 130).local(known_labels(targets, valid, 130), 65).tolist()[1] in (-1, label - 65)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "label_smoothing": 0.1, "reduction": "none"}], ids=str)
def test_error_stays_within_the_tolerance_of_the_dtype(impl: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for shape in ((45, 123, 507), (64, 32, 128)):
        assert_equal_to_truth(*problem(*shape, dtype), impl, **options)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_pytorch_in_the_same_dtype(impl: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(123, 64, 507, dtype, seed=3)
    x64, w64 = leaves(hidden, weight, torch.float64)
    truth(x64, w64, targets).backward()
    theirs, ours = leaves(hidden, weight), leaves(hidden, weight)
    F.cross_entropy((theirs[0] @ theirs[1].T).float(), targets).backward()
    linear_cross_entropy(*ours, targets, impl=impl).backward()
    for mine, their, exact in zip(ours, theirs, (x64, w64), strict=True):
        assert mine.grad is not None and their.grad is not None and exact.grad is not None
        assert error(mine.grad, exact.grad) <= 2 * error(their.grad, exact.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_reduction_none_gives_every_token_its_own_gradient(impl: str) -> None:
    """Liger-Kernel issue 968: with reduction none every token was scaled by the first one's upstream gradient."""
    hidden, weight, targets = problem(23, 16, 61, torch.float64)
    for picked in torch.nonzero(targets != -100).flatten()[:3].tolist():
        x, w = leaves(hidden, weight)
        linear_cross_entropy(x, w, targets, reduction="none", impl=impl)[picked].backward()
        x64, w64 = leaves(hidden, weight)
        F.cross_entropy(x64 @ w64.T, targets, reduction="none")[picked].backward()
        torch.testing.assert_close(x.grad, x64.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(w.grad, w64.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_weights_scale_each_tokens_whole_loss(impl: str, reduction: str) -> None:
    hidden, weight, targets = problem(45, 24, 123, torch.float64)
    weights = torch.rand(45, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    weights[5] = 0.0
    options = {"token_weights": weights, "z_loss": 1e-2, "label_smoothing": 0.1, "reduction": reduction}
    assert_equal_to_truth(hidden, weight, targets, impl, **options)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_given_rows_choose_the_tokens_and_padding_adds_nothing(impl: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(45, 24, 123, torch.float64)
    hidden[0] = float("nan")  # padded entries must not read a real token
    targets[0] = -100
    valid = torch.nonzero(targets != -100).flatten()
    rows = torch.full((128,), -1, dtype=dtype, device=DEVICE)
    rows[: len(valid)] = valid.to(dtype)
    x, w = leaves(hidden, weight)
    loss, metrics = linear_cross_entropy_with_metrics(x, w, targets, rows=rows, impl=impl)
    loss.backward()
    clean, w64 = leaves(hidden.nan_to_num(0.0), weight)
    F.cross_entropy(clean @ w64.T, targets).backward()
    torch.testing.assert_close(x.grad, clean.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w.grad, w64.grad, rtol=1e-10, atol=1e-12)
    assert metrics.count == len(valid)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_that_name_an_ignored_target_carry_no_loss(impl: str) -> None:
    hidden, weight, targets = problem(12, 16, 61, torch.float64, ignored=0.5)
    everything = torch.arange(12, device=DEVICE)
    a = linear_cross_entropy(hidden, weight, targets, rows=everything, impl=impl)
    torch.testing.assert_close(a, F.cross_entropy(hidden @ weight.T, targets))
    hidden[targets == -100] = float("nan")
    x, w = leaves(hidden, weight)
    linear_cross_entropy(x, w, targets, rows=everything, impl=impl).backward()
    assert x.grad is not None and x.grad.isfinite().all() and w.grad is not None and w.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_targets_has_loss_zero_and_zero_gradients(impl: str, reduction: str) -> None:
    hidden, weight, targets = problem(9, 16, 61, torch.float32)
    targets[:] = -100
    for rows in (None, torch.full((128,), -1, device=DEVICE)):
        x, w = leaves(hidden, weight)
        loss, metrics = linear_cross_entropy_with_metrics(x, w, targets, rows=rows, reduction=reduction, impl=impl)
        loss.sum().backward()
        assert loss.sum() == 0 and metrics.count == 0 and metrics.correct == 0
        assert x.grad is not None and not x.grad.any() and w.grad is not None and not w.grad.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_metrics_equal_those_of_all_logits(impl: str) -> None:
    hidden, weight, targets = problem(45, 24, 123, torch.float64)
    hidden[:9] = weight[targets[:9].clamp(min=0)] * 3  # some hits
    _, metrics = linear_cross_entropy_with_metrics(hidden, weight, targets, softcap=9.0, z_loss=0.1, impl=impl)
    assert isinstance(metrics, LossMetrics) and metrics.lse is not None and metrics.token_losses is not None
    logits = 9.0 * torch.tanh(hidden @ weight.T / 9.0)
    valid = targets != -100
    hits = ((logits.argmax(1) == targets) & valid).sum()
    assert hits > 2 and metrics.correct == hits and metrics.count == valid.sum()
    torch.testing.assert_close(metrics.lse, torch.where(valid, logits.logsumexp(1), 0.0))
    torch.testing.assert_close(metrics.token_losses, truth(hidden, weight, targets, softcap=9.0, z_loss=0.1, reduction="none"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tie_is_no_hit(impl: str) -> None:
    """A zero head would otherwise report an accuracy of 100 %."""
    hidden, weight, targets = problem(9, 16, 61, torch.float32)
    _, metrics = linear_cross_entropy_with_metrics(hidden, weight * 0, targets, impl=impl)
    assert metrics.correct == 0


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_large_logits_neither_overflow_nor_lose_the_loss(impl: str) -> None:
    hidden, weight, targets = problem(19, 16, 61, torch.float32)
    x, w = leaves(hidden * 300, weight)
    loss = linear_cross_entropy(x, w, targets, impl=impl)
    loss.backward()
    x64, w64 = leaves(hidden * 300, weight, torch.float64)
    expected = truth(x64, w64, targets)
    expected.backward()
    assert (x64 @ w64.T).abs().max() > 1000, "exp of such a logit overflows fp32"
    assert x.grad is not None and w.grad is not None and x64.grad is not None and w64.grad is not None
    # a logit of 1000 is rounded to 6e-5 in fp32
    assert max(error(loss.detach(), expected.detach()), error(x.grad, x64.grad), error(w.grad, w64.grad)) < 1e-4


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_offset_common_to_all_logits_changes_nothing(impl: str) -> None:
    """pytorch pull request 195829: lse - logit, both near 4096, keeps three digits of the loss."""
    hidden, weight, targets = problem(19, 16, 61, torch.float32)
    hidden[:, 0], weight[:, 0] = 64.0, 64.0
    weight[:, 1:] = (weight[:, 1:] * 4).round() / 4  # exact logits: fp32 has 11 bits behind the point at 4096
    hidden[:, 1:] = (hidden[:, 1:] * 4).round() / 4
    x, w = leaves(hidden, weight)
    loss = linear_cross_entropy(x, w, targets, impl=impl)
    loss.backward()
    x64, w64 = leaves(hidden, weight, torch.float64)
    expected = F.cross_entropy(x64 @ w64.T, targets)
    expected.backward()
    assert x.grad is not None and x64.grad is not None and w.grad is not None and w64.grad is not None
    assert error(loss.detach(), expected.detach()) < 1e-6
    assert error(x.grad[:, 1:], x64.grad[:, 1:]) < 2e-6 and error(w.grad[:, 1:], w64.grad[:, 1:]) < 2e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_targets_gradient_is_subtracted_before_rounding(impl: str) -> None:
    """flash-linear-attention issue 1231: probability near 1, where bf16(p) - 1 keeps no digit of the gradient."""
    V, H = 64, 64
    hidden = torch.eye(H, device=DEVICE, dtype=torch.bfloat16)[:8] * 9.0
    # 9 * 1.0078125 = 9.0703 is no bf16 number: a gradient from the stored logit would be twice too large
    weight = torch.eye(V, H, device=DEVICE, dtype=torch.bfloat16) * 1.0078125
    targets = torch.arange(8, device=DEVICE)
    x, w = leaves(hidden, weight)
    linear_cross_entropy(x, w, targets, reduction="sum", impl=impl).backward()
    x64, w64 = leaves(hidden, weight, torch.float64)
    F.cross_entropy(x64 @ w64.T, targets, reduction="sum").backward()
    assert x.grad is not None and x64.grad is not None and w.grad is not None and w64.grad is not None
    own, expected = x.grad.double().diagonal(), x64.grad.diagonal()
    assert (1 + expected).min() > 0.9, "the case is one of p near 1"
    assert ((own - expected).abs() / expected.abs()).max() < 2e-2
    assert error(w.grad, w64.grad) < 2e-2


@pytest.mark.parametrize("impl", OURS)
def test_weight_gradient_over_many_chunks_is_summed_wide(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger-Kernel issues 512 and 827, ml-cross-entropy issues 14 and 18: chunks added up in bf16."""
    hidden, weight, targets = problem(192, 16, 32, torch.bfloat16, ignored=0.0)
    hidden += 1  # all chunks push the same way: rounding to the growing sum does not average out
    whole = leaves(hidden, weight)
    linear_cross_entropy(*whole, targets, impl=impl).backward()
    monkeypatch.setattr("chatmill.kernels.cross_entropy.torch_tier.CHUNK_BYTES", 8 * 32 * 4)
    monkeypatch.setattr("chatmill.kernels.cross_entropy.tiles.chunk_rows", lambda *_: 8)
    chunked = leaves(hidden, weight)
    linear_cross_entropy(*chunked, targets, impl=impl).backward()
    x64, w64 = leaves(hidden, weight, torch.float64)
    F.cross_entropy(x64 @ w64.T, targets).backward()
    assert whole[1].grad is not None and chunked[1].grad is not None and w64.grad is not None
    one, many = error(whole[1].grad, w64.grad), error(chunked[1].grad, w64.grad)
    assert many <= 1.2 * one, f"24 chunks: error {many:.2e}, one chunk: {one:.2e}"


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strided_inputs_and_gradients_are_read_as_they_lie(impl: str) -> None:
    hidden, weight, targets = problem(45, 48, 61, torch.float64)
    x, w = leaves(hidden, weight)
    token_targets = torch.stack([targets, targets], 1)
    loss = linear_cross_entropy(x[:, ::2], w[:, ::2], token_targets[:, 0], reduction="none", impl=impl)
    loss.backward(torch.arange(90, dtype=torch.float64, device=DEVICE)[::2])
    x64, w64 = leaves(hidden, weight)
    expected = F.cross_entropy(x64[:, ::2] @ w64[:, ::2].T, targets, reduction="none")
    expected.backward(torch.arange(90, dtype=torch.float64, device=DEVICE)[::2])
    torch.testing.assert_close(x.grad, x64.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w.grad, w64.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_may_run_twice_and_a_loss_may_be_used_twice(impl: str, reduction: str) -> None:
    hidden, weight, targets = problem(23, 16, 61, torch.float64)
    x, w = leaves(hidden, weight)
    loss = linear_cross_entropy(x, w, targets, reduction=reduction, impl=impl).sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    again = torch.autograd.grad(loss * 3, (x, w), retain_graph=True)
    twice = torch.autograd.grad(loss + loss**2, (x, w))
    for a, b, c in zip(first, again, twice, strict=True):
        torch.testing.assert_close(b, 3 * a)
        torch.testing.assert_close(c, a * (1 + 2 * loss.detach()))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_tied_head_adds_both_its_gradients(impl: str) -> None:
    _, weight, targets = problem(23, 16, 61, torch.float64)
    tokens = torch.arange(23, device=DEVICE) % 61
    both = []
    for fused in (True, False):
        w = weight.clone().requires_grad_()
        hidden = F.embedding(tokens, w).tanh()
        loss = linear_cross_entropy(hidden, w, targets, impl=impl) if fused else F.cross_entropy(hidden @ w.T, targets)
        loss.backward()
        both.append(w.grad)
    torch.testing.assert_close(both[0], both[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", OURS)
def test_a_frozen_side_gets_no_gradient_and_the_other_is_unchanged(impl: str) -> None:
    hidden, weight, targets = problem(23, 16, 61, torch.float64)
    x, w = leaves(hidden, weight)
    linear_cross_entropy(x, w, targets, impl=impl).backward()
    only_x, only_w = leaves(hidden, weight)
    linear_cross_entropy(only_x, weight, targets, impl=impl).backward()
    linear_cross_entropy(hidden, only_w, targets, impl=impl).backward()
    torch.testing.assert_close(only_x.grad, x.grad)
    torch.testing.assert_close(only_w.grad, w.grad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_final_norm_folded_in_sees_only_rows_with_loss(impl: str) -> None:
    hidden, weight, targets = problem(23, 16, 61, torch.float64)
    scale = torch.rand(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(DEVICE)
    x, w = leaves(hidden, weight)
    norm = scale.clone().requires_grad_()
    linear_cross_entropy(x, w, targets, norm_weight=norm, norm_eps=1e-5, impl=impl).backward()
    x64, w64 = leaves(hidden, weight)
    norm64 = scale.clone().requires_grad_()
    F.cross_entropy(F.rms_norm(x64, (16,), norm64, 1e-5) @ w64.T, targets).backward()
    for mine, theirs in ((x, x64), (w, w64), (norm, norm64)):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    module_form = linear_cross_entropy(
        hidden, weight, targets, norm=lambda h: F.rms_norm(h, (16,), scale, 1e-5), reduction="none", impl=impl
    )
    folded = linear_cross_entropy(hidden, weight, targets, norm_weight=scale, norm_eps=1e-5, reduction="none", impl=impl)
    torch.testing.assert_close(module_form, folded)
    broken = torch.where((targets == -100)[:, None], float("nan"), hidden)
    assert linear_cross_entropy(broken, weight, targets, norm_weight=scale, impl=impl).isfinite()


@pytest.mark.parametrize("impl", OURS)
def test_without_gradients_only_the_loss_is_computed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = problem(45, 24, 123, torch.float32)
    x, w = leaves(hidden, weight)
    expected = linear_cross_entropy(x, w, targets, impl=impl).detach()
    seen: list[tuple[bool, bool]] = []
    run = module._run

    def spy(*args: Any) -> Any:
        seen.append(args[-1])
        return run(*args)

    monkeypatch.setattr(module, "_run", spy)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, w, targets, impl=impl), expected)
    assert seen == [(False, False)]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(impl: str, reentrant: bool) -> None:
    hidden, weight, targets = problem(23, 16, 61, torch.float64)
    grads = []
    for through in (False, True):
        x, w = leaves(hidden, weight)

        def run(a: Tensor, w: Tensor = w) -> Tensor:
            return linear_cross_entropy(a.tanh(), w, targets, impl=impl)

        (checkpoint(run, x, use_reentrant=reentrant) if through else run(x)).backward()
        grads.append((x.grad, w.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize("impl", OURS)
def test_autocast_multiplies_in_its_dtype_and_leaves_master_gradients_wide(impl: str) -> None:
    hidden, weight, targets = problem(64, 32, 128, torch.float32)
    x, w = leaves(hidden, weight)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = linear_cross_entropy(x, w, targets, impl=impl)
    loss.backward()
    narrow = linear_cross_entropy(hidden.bfloat16(), weight, targets, impl=impl)
    assert loss.dtype is torch.float32 and w.grad is not None and w.grad.dtype is torch.float32
    # where torch multiplies, a loss with gradients is taken from rounded logits, one without from exact ones
    torch.testing.assert_close(loss.detach(), narrow, rtol=LOSS_TOLERANCE[torch.bfloat16] if impl == BY_TORCH else 0.0, atol=0)


def test_operators_pass_torchs_own_checks() -> None:
    """Schema, fake tensors, autograd registration and tracing: what torch.compile relies on."""
    x, weight, targets = problem(9, 16, 61, torch.float32, ignored=0.0)
    x.requires_grad_(), weight.requires_grad_()
    coefficients = torch.rand(9, device=DEVICE)
    for impl in ("torch", "triton"):
        torch.library.opcheck(module.sum_op, (x, weight, targets, coefficients, 0.1, 1e-3, 5.0, "auto", impl, True, True))
        torch.library.opcheck(module.rows_op, (x, weight, targets, 0.1, 1e-3, 5.0, "auto", impl))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_code_gives_the_eager_loss_and_gradients(reduction: str) -> None:
    hidden, weight, targets = problem(24, 16, 61, torch.float32)
    rows = torch.full((128,), -1, dtype=torch.int32, device=DEVICE)
    valid = torch.nonzero(targets != -100).flatten().int()
    rows[: len(valid)] = valid

    def step(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x * 2, w, targets, rows=rows, softcap=9.0, reduction=reduction, impl="torch").sum()

    eager, compiled = leaves(hidden, weight), leaves(hidden, weight)
    step(*eager).backward()
    torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.zeros(2, 3, 16)}, "Flatten batch and sequence"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"shape \(4,\)"),
        ({"targets": torch.zeros(4)}, "integer targets"),
        ({"reduction": "sum", "normalizer": 3.0}, "normalizer divides a mean"),
        ({"reduction": "average"}, "'mean', 'sum' or 'none'"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"impl": "cuda"}, "impl='cuda' is unknown"),
        ({"products": "cublas"}, "products='cublas'; expected 'auto', 'triton' or 'torch'"),
        ({"impl": "torch", "products": "triton"}, "products='triton' needs impl='triton'"),
        ({"impl": "reference", "products": "triton"}, "products='triton' needs impl='triton'"),
        ({"norm": torch.tanh, "norm_weight": torch.ones(16)}, "norm and norm_weight"),
        ({"impl": "reference", "shard": VocabularyShard(0, 61)}, "knows only the whole head"),
    ],
)
def test_misuse_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 16),
        "weight": torch.zeros(61, 16),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**{**arguments, **change})


def test_the_public_modules_work_where_triton_is_not_installed() -> None:
    program = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, NoTriton())
import torch
from chatmill.kernels import cross_entropy, linear_cross_entropy, rms_norm, rope, swiglu
x = torch.randn(5, 8, requires_grad=True)
y = rms_norm.rms_norm(x, torch.ones(8))
y = swiglu.swiglu(y, y)
loss = linear_cross_entropy.linear_cross_entropy(y, torch.randn(11, 8), torch.arange(5))
loss.backward()
assert "triton" not in sys.modules and x.grad.isfinite().all()
try:
    swiglu.swiglu(y, y, impl="triton")
except ValueError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout
