"""Optimizers against the papers and torch's own; groups, decay rules and learning-rate schedules."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from chatmill.config import ConfigError, validate
from chatmill.trainer.config import OptimizerSection, Recipe, ScheduleSection
from chatmill.trainer.optim.muon import newton_schulz, shard_rows
from chatmill.trainer.optim.optimizer import build_optimizer, parameter_groups, saved_state, set_rate
from chatmill.trainer.optim.schedule import learning_rate
from chatmill.trainer.optim.zero_muon import SlicedMatrix, slices_of


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


def test_inverse_sqrt_halves_when_the_position_quadruples_and_stops_at_the_minimum() -> None:
    schedule = ScheduleSection(name="inverse_sqrt", warmup_steps=9, min_ratio=0.25)
    rates = [learning_rate(step, 1000, 1.0, schedule) for step in range(1000)]
    assert rates[9] == pytest.approx(1.0)  # position 10
    assert rates[39] == pytest.approx(0.5)  # position 40
    assert rates[159] == rates[999] == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_no_schedule_jumps(name: str) -> None:
    schedule = ScheduleSection(name=name, warmup_steps=100, min_ratio=0.0, decay_fraction=0.2)
    rates = [learning_rate(step, 1000, 1.0, schedule) for step in range(1200)]  # past its end as well
    assert max(abs(a - b) for a, b in itertools.pairwise([0.0, *rates])) <= 0.0101
    assert all(0.0 <= rate <= 1.0 for rate in rates)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_equal_steps_have_the_same_rates_by_tokens_as_by_steps(name: str) -> None:
    by_steps = ScheduleSection(name=name, warmup_steps=4)
    by_tokens = ScheduleSection(name=name, unit="tokens", warmup_tokens=5 * 1000)
    for step in range(50):
        expected = learning_rate(step, 50, 3e-4, by_steps)
        assert learning_rate(step, 7, 3e-4, by_tokens, (step + 1) * 1000, 50 * 1000) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("train", "schedule", "expected"),
    [
        ({"tokens": 5000}, {"unit": "tokens"}, 5000),
        ({"tokens": 5000}, {"unit": "tokens", "total_tokens": 8000}, 8000),
        ({}, {"unit": "tokens", "total_tokens": 8000}, 8000),
        ({"tokens": 5000}, {}, None),
    ],
)
def test_a_token_budget_is_the_end_of_a_schedule_by_tokens(train: dict, schedule: dict, expected: int | None) -> None:
    assert validate(Recipe, {"train": train, "schedule": schedule}, "recipe").schedule_tokens == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit": "tokens"}, "set train.tokens"),
        ({"total_tokens": 100}, "schedule.unit=tokens"),
        ({"unit": "tokens", "total_tokens": 100, "warmup_steps": 3}, "warmup_tokens, not warmup_steps"),
        ({"unit": "tokens", "total_tokens": 100, "warmup_tokens": 100}, "leaves nothing"),
        ({"name": "inverse_sqrt"}, "set warmup_steps"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(Recipe, {"schedule": fields}, "recipe")


def layers() -> nn.ModuleDict:
    return nn.ModuleDict({"embed": nn.Embedding(4, 4), "layer": nn.Linear(4, 4), "norm": nn.RMSNorm(4)})


def decayed(config: OptimizerSection) -> set[str]:
    return {n for g in parameter_groups(layers().named_parameters(), config) if g["weight_decay"] > 0 for n in g["names"]}


def test_norms_biases_and_embeddings_are_decayed_by_option_only() -> None:
    assert decayed(OptimizerSection()) == {"layer.weight"}
    assert decayed(OptimizerSection(decay_embeddings=True)) == {"layer.weight", "embed.weight"}
    assert decayed(OptimizerSection(decay_norms=True)) == {"layer.weight", "layer.bias", "norm.weight"}


def test_a_pattern_multiplies_rate_and_decay_and_the_first_that_fits_counts() -> None:
    config = OptimizerSection(
        lr=0.1, weight_decay=0.2, groups={"layer.w*": {"lr": 0.5, "weight_decay": 2.0}, "layer.*": {"lr": 0.25}}
    )
    model = layers()
    optimizer = build_optimizer(model, config)
    set_rate(optimizer, 0.04)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found[id(model["layer"].weight)] == pytest.approx((0.02, 0.4))
    assert found[id(model["layer"].bias)] == pytest.approx((0.01, 0.0))
    assert found[id(model["embed"].weight)] == pytest.approx((0.04, 0.0))


def test_a_pattern_without_a_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no parameter name matches 'layers.7.\*'"):
        build_optimizer(layers(), OptimizerSection(groups={"layers.7.*": {}}))


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


def give_gradients(*models: nn.Module) -> None:
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        grad = torch.randn_like(parameters[0])
        for parameter in parameters:
            parameter.grad = grad.clone()


@pytest.mark.parametrize(("scale", "theirs"), [("adamw", "match_rms_adamw"), ("spectral", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest(scale: str, theirs: str, nesterov: bool) -> None:
    torch.manual_seed(0)
    mine = nn.ModuleDict({"embed": nn.Embedding(8, 24), "a": nn.Linear(24, 40), "b": nn.Linear(24, 40), "c": nn.Linear(40, 24)})
    truth = copy.deepcopy(mine)
    config = OptimizerSection(name="muon", lr=0.02, muon={"nesterov": nesterov, "scale": scale})
    optimizer = build_optimizer(mine, config, precision="bf16")
    matrices = [truth[name].weight for name in "abc"]
    others = [truth["embed"].weight, *(truth[name].bias for name in "abc")]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs)
    adamw = torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(4):
        give_gradients(mine, truth)
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, a), b in zip(mine.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4, msg=name)  # bf16 inside: the order of sums differs by shape
    assert set(saved_state(optimizer, mine["a"].weight)) == {"momentum_buffer"}
    assert set(saved_state(optimizer, mine["a"].bias)) == {"exp_avg", "exp_avg_sq", "step"}


def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_vectors() -> None:
    torch.manual_seed(0)
    for shape in ((3, 20, 33), (2, 33, 20)):
        given = torch.randn(*shape, dtype=torch.float64)
        found = newton_schulz(given, 5)
        assert found.shape == given.shape
        u, _, v = torch.linalg.svd(given, full_matrices=False)
        inside = u.mT @ found @ v.mT
        values = torch.diagonal(inside, dim1=1, dim2=2)
        assert values.min() > 0.6 and values.max() < 1.25
        torch.testing.assert_close(inside, torch.diag_embed(values), atol=1e-9, rtol=0)


def test_rows_are_cut_as_dtensor_cuts_them() -> None:
    for rows, world in ((9, 8), (8, 8), (3, 4), (129, 2), (1, 4)):
        assert shard_rows(rows, world) == [len(c) for c in torch.empty(rows, 0).chunk(world)] + [0] * (
            world - len(torch.empty(rows, 0).chunk(world))
        )


def test_eight_bit_adamw_follows_adamw_and_takes_a_quarter_of_the_memory() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    mine = nn.Linear(256, 64)
    truth = copy.deepcopy(mine)
    optimizer = build_optimizer(mine, OptimizerSection(name="adamw8bit", lr=1e-3))
    reference = build_optimizer(truth, OptimizerSection(lr=1e-3))
    for _ in range(5):
        give_gradients(mine, truth)
        optimizer.step()
        reference.step()
    moved = (truth.weight - mine.weight).abs().max()
    assert 0 < moved < 2e-3  # five steps of 1e-3 each went the same way

    def bytes_of(state: dict[str, Tensor]) -> int:
        return sum(t.nbytes for key, t in state.items() if key != "step")

    eight, full = saved_state(optimizer, mine.weight), saved_state(reference, truth.weight)
    assert bytes_of(eight) < 0.26 * bytes_of(full)


def test_zero_refuses_what_it_cannot_shard() -> None:
    with pytest.raises(ConfigError, match="cuts weights in the middle of blocks"):
        validate(Recipe, {"optimizer": {"name": "adamw8bit"}, "parallel": {"strategy": "zero2"}}, "recipe")
    disk = {"strategy": "zero3", "offload": "nvme", "nvme_path": "x"}
    with pytest.raises(ConfigError, match=r"use parallel\.offload=cpu"):
        validate(Recipe, {"optimizer": {"name": "muon"}, "parallel": disk}, "recipe")


def test_muon_refuses_slices_that_are_not_a_matrix_in_the_order_of_ranks() -> None:
    assert slices_of((3, 4), 5, [(0, 0), (0, 7), (7, 5), (0, 0)]) == SlicedMatrix((3, 4), 5, (0, 7, 5, 0))
    for runs in ([(0, 7), (8, 4)], [(5, 7), (0, 5)], [(0, 7), (7, 4)], [(0, 0)], [(1, 11)]):
        with pytest.raises(RuntimeError, match="not the matrix in the order of ranks"):
            slices_of((3, 4), 0, runs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "ddp", "replicas": 2}, "belong to strategy=fsdp2"),
        ({"strategy": "zero2", "reshard_after_forward": False}, "belong to strategy=fsdp2"),
        ({"strategy": "single", "offload": "cpu"}, "has no offload"),
        ({"strategy": "zero2", "offload": "nvme", "nvme_path": "x"}, "needs strategy=zero3"),
        ({"strategy": "zero3", "offload": "nvme"}, "belong together"),
    ],
)
def test_an_engine_option_of_another_engine_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(Recipe, {"parallel": fields}, "recipe")
