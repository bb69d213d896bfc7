"""Real process groups on gloo: one run, the same numbers, any launcher, any engine, any world size on resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chatmill.run_files import read_jsonl
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import load_recipe
from chatmill.trainer.loop.loop import train

from ..conftest import cut_back, launch
from ..ranks import train_in_ranks


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def curve(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def environment(run: Path) -> dict[str, object]:
    return json.loads((run / "environment.json").read_text())


@pytest.fixture
def reference(write_recipe, tmp_path: Path) -> list[float]:
    """Losses of the run in one process."""
    train(load_recipe(str(write_recipe("reference"))))
    return losses(tmp_path / "runs" / "reference")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "accelerate-multi", "torchrun"])
def test_two_processes_are_one_run_of_world_size_two_with_the_same_losses(
    launcher: str, write_recipe, reference: list[float], tmp_path: Path
) -> None:
    recipe = write_recipe("two", parallel={"strategy": "ddp"}, train={"accumulation": 2})
    out = launch(recipe, 2, launcher=launcher)
    run = tmp_path / "runs" / "two"
    assert "world size 2  backend gloo" in out
    assert environment(run)["world_size"] == 2
    assert environment(run)["backend"] == "gloo"
    assert environment(run)["engine"] == "DistributedDataParallel"
    assert losses(run) == pytest.approx(reference, rel=2e-5)
    assert len(list(read_jsonl(run / "metrics.jsonl"))) == len(reference) + 1


@pytest.mark.slow
def test_fsdp2_shards_everything_and_trains_the_same(write_recipe, reference: list[float], tmp_path: Path) -> None:
    recipe = write_recipe("sharded", parallel={"strategy": "fsdp2"}, train={"accumulation": 2}, evaluation={"prompts": ["Hi?"]})
    out = train_in_ranks(recipe, 2)
    run = tmp_path / "runs" / "sharded"
    assert "sharded 20 of 20" in out
    assert losses(run) == pytest.approx(reference, rel=2e-5)
    whole = dict(open_checkpoint(tmp_path / "runs" / "reference").tensors())
    for name, tensor in open_checkpoint(run).tensors():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_run_continues_with_another_engine_and_another_world_size(
    write_recipe, reference: list[float], tmp_path: Path
) -> None:
    recipe = write_recipe("moved")
    run = tmp_path / "runs" / "moved"

    train_in_ranks(recipe, 2, "parallel.strategy=fsdp2", "train.accumulation=2")
    cut_back(run, 4)
    train_in_ranks(recipe, 4, "parallel.strategy=ddp", "train.accumulation=1")
    assert losses(run) == pytest.approx(reference, rel=2e-5)
    cut_back(run, 4)
    train(load_recipe(str(recipe)))
    assert losses(run) == pytest.approx(reference, rel=2e-5)
    cut_back(run, 4)
    train_in_ranks(recipe, 2, "parallel.strategy=fsdp2", "train.accumulation=1", "train.micro_batch=2")
    assert losses(run) == pytest.approx(reference, rel=2e-5)


@pytest.mark.slow
def test_single_started_twice_is_refused(write_recipe) -> None:
    with pytest.raises(AssertionError, match="each would train alone"):
        train_in_ranks(write_recipe("alone"), 2)


@pytest.mark.slow
def test_a_resumed_run_of_four_ranks_goes_on_bit_for_bit(write_recipe, tmp_path: Path) -> None:
    """Four: the sum of two ranks has one order only. See trainer/engine/ddp_buckets.py."""
    recipe = write_recipe("exact", parallel={"strategy": "ddp"}, train={"accumulation": 1, "steps": 6})
    run = tmp_path / "runs" / "exact"
    train_in_ranks(recipe, 4)
    expected = curve(run)
    weights = dict(open_checkpoint(run).tensors())
    cut_back(run, 4)
    train_in_ranks(recipe, 4)
    assert curve(run) == expected
    for name, tensor in open_checkpoint(run).tensors():
        assert torch.equal(tensor, weights[name]), name
