"""The comparison with transformers measures both sides alike, and what makes our step cheaper on a CPU changes no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatmill.kernels.cross_entropy import operators
from chatmill.trainer.bench.transformers_step import alternate, summary
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.model.decoder import Decoder


class Batch:
    step_tokens = 100


def test_both_sides_take_turns_and_the_first_pair_only_warms_up() -> None:
    now, order = [0.0], list[str]()

    def side(name: str, seconds: list[float]) -> Any:
        def step(batch: Batch) -> float:
            order.append(name)
            now[0] += seconds.pop(0)
            return 2.0 if name == "ours" else 2.00002

        return step

    batches: Any = [Batch()] * 4
    records = alternate(side("ours", [50, 1, 1, 1]), side("theirs", [9, 2, 1.5, 1]), batches, lambda: now[0])
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    rates, ratio, losses = summary(records)
    assert rates == "tokens/s: chatmill 100, transformers 67"
    assert ratio == "ratio: median 1.500 of 3 pairs (1.000 to 2.000)"
    assert losses == "losses of the first step differ by 1.0e-05 of their value"


@pytest.mark.parametrize("tied", [True, False])
def test_a_factor_that_is_known_before_changes_no_gradient_and_takes_no_pass(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "context": 64}
    model = Decoder(ModelConfig(vocab_size=97, tied_embeddings=tied, **shape))
    model.init_weights(0)
    tokens = torch.arange(40, dtype=torch.int32) * 7 % 97
    targets = torch.where(torch.arange(40) % 3 == 0, tokens.roll(-1).long(), -100)
    rows = torch.cat([(targets >= 0).nonzero().squeeze(1), torch.full((20,), -1)]).int()
    positions, bounds = torch.cat([torch.arange(25), torch.arange(15)]).int(), torch.tensor([0, 25, 40], dtype=torch.int32)
    factors: list[float] = []
    scaled = operators._scaled

    def watched(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        factors.append(float(factor))
        return scaled(gradient, factor)

    monkeypatch.setattr(operators, "_scaled", watched)

    def gradients(known: float | None) -> tuple[float, list[torch.Tensor]]:
        (model.head or model.embed).loss_scale = known
        model.zero_grad()
        output: Any = model(tokens, positions, bounds, targets=targets, rows=rows)
        (output.loss_sum * (1 / 14)).backward()
        return float(output.loss_sum.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, known, other = gradients(None), gradients(1 / 14), gradients(1 / 5)
    assert factors[:2] == [pytest.approx(1 / 14)] * 2 and factors[2:4] == [1.0, 1.0]
    for loss, grads in (known, other):
        assert loss == pytest.approx(plain[0], rel=1e-6)
        for mine, theirs in zip(grads, plain[1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_padded_rows_cost_no_logits_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from chatmill.kernels.cross_entropy import linear_cross_entropy

    seen: list[int] = []
    run = operators.run_torch
    monkeypatch.setattr(operators, "run_torch", lambda x, *rest: (seen.append(len(x)), run(x, *rest))[1])
    x, weight = torch.randn(12, 8, requires_grad=True), torch.randn(20, 8)
    targets = torch.full((12,), -100)
    targets[[1, 5, 6]] = torch.tensor([3, 0, 19])
    rows = torch.tensor([1, 5, 6] + [-1] * 125, dtype=torch.int32)
    loss = linear_cross_entropy(x, weight, targets, reduction="sum", rows=rows)
    assert seen == [3]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="sum"))
    nothing = linear_cross_entropy(x, weight, torch.full((12,), -100), reduction="sum", rows=torch.full((128,), -1))
    nothing.backward()
    assert float(nothing.detach()) == 0.0
