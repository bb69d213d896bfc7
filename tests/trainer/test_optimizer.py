"""Learning-rate schedules and the parameters that are decayed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from chatmill.trainer.config import OptimizerSection, ScheduleSection
from chatmill.trainer.optimizer import build_optimizer, learning_rate


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_rate_rises_to_the_peak_and_ends_at_the_minimum(name: str) -> None:
    schedule = ScheduleSection(name=name, warmup_steps=10, min_ratio=0.1)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(2.0 / 11)
    assert max(rates) == rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_wsd_is_stable_until_its_decay_begins() -> None:
    schedule = ScheduleSection(name="wsd", decay_fraction=0.2, min_ratio=0.0)
    rates = [learning_rate(step, 101, 1.0, schedule) for step in range(101)]
    assert rates[:81] == [pytest.approx(1.0)] * 81
    assert rates[90] == pytest.approx(0.5)


def test_norms_biases_and_embeddings_are_not_decayed() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "layer": nn.Linear(4, 4), "norm": nn.RMSNorm(4)})
    optimizer = build_optimizer(model, OptimizerSection(weight_decay=0.1))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert decayed == {id(model["layer"].weight)}


def test_a_step_is_the_adamw_of_the_paper() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    before, g = model.weight.detach().clone(), torch.randn(2, 3)
    config = OptimizerSection(lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    model.weight.grad = g.clone()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)
