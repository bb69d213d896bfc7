"""The predicted step against published runs, and against what must follow from more or less of each resource."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.trainer.plan.published import H100, MET, MODELS, ROWS

from chatmill.config import ConfigError
from chatmill.launcher.__main__ import main
from chatmill.trainer.config import ModelConfig, load_recipe
from chatmill.trainer.plan.hardware import GPUS, find_gpu
from chatmill.trainer.plan.layouts import candidates, named, recommend
from chatmill.trainer.plan.parts import parts_of
from chatmill.trainer.plan.plan import make_plan, show
from chatmill.trainer.plan.step_time import RECOMPUTED, Layout, Load, Network, StepTime, predict_step

SHAPE = ModelConfig.model_validate({**MODELS["Llama 8B"], "context": 131072})
PARTS = parts_of(load_recipe("8b"), SHAPE)
LOAD = Load(tokens=16384, length=8192.0)


def step(layout: Layout, load: Load = LOAD, network: Network | None = None) -> StepTime:
    return predict_step(SHAPE, PARTS, H100, layout, load, network)


def test_fourteen_of_fifteen_published_runs_are_met_within_8_percent() -> None:
    residuals = [row.predicted().tokens_per_s_per_gpu / row.speed - 1 for row in ROWS]
    assert len(MET) == 14 and all(abs(residual) < 0.08 for residual in residuals[: len(MET)]), residuals
    assert residuals[-1] == pytest.approx(0.40, abs=0.03)  # launches of a small model, which are not in the prediction


def test_what_computes_less_or_travels_faster_takes_less_time() -> None:
    one = step(Layout("single"))
    assert one.exposed == 0 and one.tokens == 16384
    assert step(Layout("single"), replace(LOAD, recompute=RECOMPUTED["full"])).products == pytest.approx(one.products * 4 / 3)
    assert step(Layout("single"), replace(LOAD, recompute=RECOMPUTED["selective"])).attention == one.attention
    assert step(Layout("single"), replace(LOAD, length=4096.0)).attention == pytest.approx(one.attention / 2)
    assert step(Layout("single"), replace(LOAD, loss_share=0.25)).loss == pytest.approx(one.loss / 4)
    many = step(Layout("single"), replace(LOAD, accumulation=4))
    assert many.seconds < 4 * one.seconds and many.seconds - many.optimizer == pytest.approx(4 * (one.seconds - one.optimizer))
    slow, fast = (step(Layout("fsdp2", shards=64), network=Network(8, rate)) for rate in (2e9, 50e9))
    assert slow.exposed > 10 * fast.exposed and slow.products == fast.products
    node, nodes = (step(Layout("fsdp2", shards=8, replicas=4), network=Network(size, 5e9)) for size in (8, 4))
    assert node.exposed < nodes.exposed  # shards within a node, and across two


def test_what_is_divided_is_not_counted_twice() -> None:
    whole = step(Layout("single"))
    context, tensor = step(Layout("fsdp2", context=4)), step(Layout("fsdp2", tensor=4))
    for part in ("products", "attention", "loss"):
        assert getattr(context, part) == pytest.approx(getattr(whole, part) / 4)
        assert getattr(tensor, part) == pytest.approx(getattr(whole, part) / 4)
    assert context.tokens == tensor.tokens == whole.tokens and min(context.exposed, tensor.exposed) > 0
    assert step(Layout("fsdp2", shards=8, replicas=2)).tokens == 16 * whole.tokens


def test_zero_1_waits_for_the_weights_and_ddp_for_the_gradients() -> None:
    slow = Network(8, 1e9)
    ddp, zero1 = step(Layout("ddp", replicas=16), network=slow), step(Layout("zero1", shards=16), network=slow)
    n = PARTS.trained
    assert zero1.exposed > 2 * n / (8 * 0.8 * 1e9)
    assert ddp.exposed == pytest.approx(
        2 * 4 * n * 15 / 16 / (8 * 0.8 * 1e9) - (ddp.products + ddp.attention) * 2 / 3, rel=0.35
    )


def test_the_layouts_of_two_nodes_are_ranked_and_the_best_is_named() -> None:
    assert [str(layout) for layout in candidates(16, ("ddp", "fsdp2", "zero1"), Network())] == [
        "ddp",
        "fsdp2 replicas 2 x shards 8",
        "fsdp2 shards 16",
        "zero1 shards 16",
        "ddp context 2",
        "fsdp2 shards 8 x context 2",
        "ddp context 4",
        "fsdp2 shards 4 x context 4",
        "ddp context 8",
        "fsdp2 shards 2 x context 8",
    ]
    assert candidates(1, ("ddp", "single"), Network()) == [Layout("single")]
    assert [str(layout) for layout in candidates(9, ("fsdp2",), Network())] == ["fsdp2 shards 9"]  # no whole nodes
    large = load_recipe("8b")
    plan = make_plan(large, large.model.shape(), H100, 16, engines=["ddp", "fsdp2"], world_sizes=[16])
    assert plan.overrides == named(plan.layouts[0], large) == ("parallel.strategy=fsdp2", "parallel.replicas=2")
    assert {ranked.layout.engine for ranked in plan.layouts if not ranked.fits} == {"ddp"}
    assert not plan.work.assumed and plan.layouts[0].step is not None
    assert plan.work.step_seconds == plan.layouts[0].step.seconds
    assert "parallel.replicas=2" in show(plan) and "not measured" in show(plan)
    offloaded = load_recipe("8b", ["parallel.strategy=fsdp2", "parallel.offload=cpu"])
    ranked = make_plan(offloaded, offloaded.model.shape(), H100, 16, engines=["fsdp2"], world_sizes=[16])
    assert ranked.work.assumed and all(r.step is None for r in ranked.layouts) and "not predicted with offload" in show(ranked)
    assert recommend((), H100, large)[0] is None


def test_a_pack_too_long_for_one_gpu_is_divided() -> None:
    words = ["data.sequence_length=131072", "train.accumulation=2"]
    long = load_recipe("8b", words)
    plan = make_plan(long, long.model.shape(), H100, 16, engines=["fsdp2"], world_sizes=[16])
    fitting = [ranked.layout for ranked in plan.layouts if ranked.fits]
    assert fitting and all(layout.context > 1 for layout in fitting)
    assert plan.layout is not None and f"train.accumulation={2 * plan.layout.context}" in show(plan)
    tokens = {ranked.step.tokens for ranked in plan.layouts if ranked.step}
    assert tokens == {16 * 2 * 131072}
    asked = load_recipe("8b", [*words, "parallel.strategy=fsdp2", "parallel.context=4"])
    given = make_plan(asked, asked.model.shape(), H100, 16, engines=["fsdp2"], world_sizes=[16])
    assert given.work.step_tokens == 4 * 2 * 131072
    steps = {str(ranked.layout): (ranked.accumulation, ranked.step.tokens) for ranked in given.layouts if ranked.step}
    assert steps["fsdp2 shards 4 x context 4"] == (2, given.work.step_tokens)
    assert steps["fsdp2 shards 8 x context 2"] == (1, given.work.step_tokens)


def test_every_gpu_has_bandwidths() -> None:
    assert all(3e11 <= gpu.memory_bandwidth <= 8e12 and 3e10 <= gpu.link_bandwidth <= 9e11 for gpu in GPUS)
    assert find_gpu("4090").link_bandwidth == 32e9  # PCIe 4 x16: no NVLink


def test_the_command_takes_the_network_and_gives_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "tiny", "--gpu", "4090", "--gpus", "8", "--gpus-per-node", "4", "--node-gbits", "25", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"]["engine"] == found["engine"] and found["layouts"][0]["step"]["seconds"] > 0
    assert main(["plan", "tiny", "--node-gbits", "0"]) == 2
    assert "--node-gbits 0.0: expected at least" in capsys.readouterr().err


def test_a_wrong_mfu_is_refused() -> None:
    given = load_recipe("tiny")
    with pytest.raises(ConfigError, match="mfu"):
        make_plan(given, given.model.shape(), H100, 1, mfu=1.5)
