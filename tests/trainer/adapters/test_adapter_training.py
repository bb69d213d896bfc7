"""What belongs to a training also works for an adapter: compilation, optimizers, averages, guard, watchdog, kill -9."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.adapters.prepare import frozen_parameters, trained_parameters
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, open_checkpoint
from chatmill.trainer.config import Recipe, load_recipe
from chatmill.trainer.engine.torch_engine import TorchEngine
from chatmill.trainer.loop.loop import train as train_run
from chatmill.trainer.run.watchdog import EXIT_CODE

from ..engine.engine_worker import same, state, train
from ..ranks import train_in_ranks
from .adapter_worker import restored
from .conftest import alone, engine_on

NF4 = {"base_precision": "nf4"}
COMPILED: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"rank": 4, "method": "dora", "targets": ["q"]}},
    "lora": {"adapter": {"rank": 4, "train": ["*norm.weight"]}},
    "nf4 recomputed": {"adapter": {"rank": 4, "init": "pissa"}, "model": NF4, "train": {"activation_checkpointing": True}},
    "int8": {"adapter": {"rank": 4, "method": "dora"}, "model": {"base_precision": "int8"}},
    "tables": {"adapter": {"rank": 4, "targets": ["embed", "head", "v"]}},
}


@pytest.mark.parametrize("kind", ["dora", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in list(COMPILED)[1:])])
def test_compiled_layers_train_an_adapter_as_plain_ones_do(
    kind: str, base: Checkpoint, recipe_on: Callable[..., Recipe]
) -> None:
    sections = COMPILED[kind]
    steps = 1 if kind == "dora" else 2  # every further shape of a batch is compiled anew
    plain = train(engine_on(base, recipe_on(**sections)), steps)
    compiled = sections.get("train", {}) | {"compile": True, "compile_backend": "aot_eager"}
    engine = engine_on(base, recipe_on(**{**sections, "train": compiled}))
    assert engine.describe()["compile"] == "aot_eager"
    assert train(engine, steps) == pytest.approx(plain, rel=1e-6)


def all_frozen_are_the_bases(engine: Any, base: Checkpoint) -> bool:
    return all(torch.equal(p, base.tensor(name)) for name, p in frozen_parameters(engine.decoder))


@pytest.mark.parametrize("name", ["muon", "adamw8bit"])
def test_every_optimizer_trains_the_adapter_alone_and_goes_on_from_what_it_saved(
    name: str, base: Checkpoint, recipe_on: Callable[..., Recipe]
) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao", reason="needs the extra `optim8bit`")
    recipe = recipe_on(adapter={"rank": 64, "targets": ["up"]}, optimizer={"name": name})  # 4,096 elements: 8 bits take hold
    engine = engine_on(base, recipe)
    losses = train(engine, 3)
    assert losses[-1] < losses[0] and all_frozen_are_the_bases(engine, base)
    saved = state(engine)
    kinds = {key.rpartition(".")[2] for key in saved if key.startswith("optimizer:")}
    assert {"muon": "momentum_buffer", "adamw8bit": "exp_avg_sq_codes"}[name] in kinds, kinds
    again = restored(alone(), base, recipe, saved)
    same(state(again), saved)
    assert train(again, 2, skip=3) == train(engine, 2, skip=3)


def test_the_average_is_that_of_the_adapter(base: Checkpoint, recipe_on: Callable[..., Recipe]) -> None:
    engine = engine_on(base, recipe_on(adapter={"rank": 4, "targets": ["q"]}, train={"ema": 0.75}))
    by_hand = {name: parameter.detach().clone() for name, parameter in trained_parameters(engine.decoder)}
    for step in range(3):
        train(engine, 1, skip=step)
        for name, parameter in trained_parameters(engine.decoder):
            by_hand[name].lerp_(parameter.detach(), 0.25)
    found = {name.removeprefix("ema:ema."): tensor for name, tensor in state(engine).items() if name.startswith("ema:")}
    assert found.keys() == by_hand.keys()
    for name, tensor in by_hand.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run / "events.jsonl") if line["event"] == kind]


def test_the_guard_leaves_a_step_out_and_rolls_an_adapter_back(
    write_adapter_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = TorchEngine.forward_backward, [0]

    def spoiled(engine: TorchEngine, batches: Any) -> Any:
        calls[0] += 1
        sums = real(engine, batches)
        return replace(sums, loss_sum=sums.loss_sum * {2: math.nan, 7: 1e3}.get(calls[0], 1.0))

    monkeypatch.setattr(TorchEngine, "forward_backward", spoiled)
    settings = {"train": {"steps": 8, "accumulation": 1}, "checkpoint": {"every_steps": 1, "keep": 9}}
    guard = {"min_history": 4, "spike_z": 50.0, "on_spike": "rollback"}
    recipe = load_recipe(str(write_adapter_recipe("guarded", adapter={"rank": 4}, guard=guard, **settings)))
    assert train_run(recipe) == 8
    assert [(event["step"], event["kind"]) for event in events(recipe.run_dir, "skipped_step")] == [(2, "nan"), (7, "spike")]
    assert [(event["step"], event["to_step"]) for event in events(recipe.run_dir, "rollback")] == [(7, 6)]
    first, second, third = (dict(open_checkpoint(folder).tensors()) for folder in list_checkpoints(recipe.run_dir)[:3])
    assert all(torch.equal(first[name], second[name]) for name in first), "an adapter changed in the step left out"
    assert any(not torch.equal(second[name], third[name]) for name in first)


def curve(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
def test_an_adapter_that_was_killed_and_then_hung_goes_on_with_other_engines(write_adapter_recipe: Any) -> None:
    """kill -9 of a rank of ddp, then fsdp2 until a rank hangs and the watchdog ends it, then one process: one curve."""
    options: dict[str, Any] = {
        "adapter": {"rank": 4, "method": "dora", "train": ["norm.weight"]},
        "train": {"steps": 8, "accumulation": 2, "hang_timeout_s": 4},
        "checkpoint": {"every_steps": 2, "asynchronous": False},
        "evaluation": {"at_end": False},
    }
    whole = load_recipe(str(write_adapter_recipe("whole", **options)))
    train_run(whole)
    path = write_adapter_recipe("moved", **options)
    recipe = load_recipe(str(path))
    fault = recipe.run_dir / "logs" / "fault.json"
    for strategy, kind, step, code in (("ddp", "kill", 4, -9), ("fsdp2", "sleep", 6, EXIT_CODE)):
        with pytest.raises(AssertionError, match=rf"rank \d ended with {code}:"):
            train_in_ranks(path, 2, f"parallel.strategy={strategy}", "train.accumulation=1", fault=f"{kind}:1:{step}")
        told = json.loads(fault.read_text())
        assert (told["kind"], told["step"]) == (kind, step)
        fault.unlink()
    assert [event["ranks"] for event in events(recipe.run_dir, "hang")] == [[1]]
    assert train_run(recipe) == 8
    found, wanted = curve(recipe.run_dir), curve(whole.run_dir)
    assert [line["step"] for line in found] == list(range(1, 9))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in wanted], rel=2e-5), name
    resumed = [(event["strategy"], event["world_size"], event["step"]) for event in events(recipe.run_dir, "resume")]
    assert resumed == [("fsdp2", 2, 2), ("single", 1, 4)]
    ours, theirs = (dict(open_checkpoint(run.run_dir).tensors()) for run in (recipe, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
