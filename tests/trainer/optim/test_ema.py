"""Averaged weights in a run: the recursion, checkpoints, validation, export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatmill.config import ConfigError
from chatmill.launcher.__main__ import main
from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import load_recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.evaluation.evaluate import evaluate_fully
from chatmill.trainer.evaluation.options import EvaluationOptions
from chatmill.trainer.loop.loop import train
from chatmill.trainer.optim.ema import WeightAverage

from ..conftest import cut_back


def test_the_average_is_the_sum_of_decaying_weights() -> None:
    torch.manual_seed(0)
    history = [torch.randn(3, 2, dtype=torch.float64).float() for _ in range(6)]
    weight = history[0].clone()
    average = WeightAverage([weight], decay=0.75)
    for value in history[1:]:
        weight.copy_(value)
        average.update()
    expected = 0.75**5 * history[0].double()
    for i, value in enumerate(history[1:]):
        expected += 0.25 * 0.75 ** (4 - i) * value.double()
    torch.testing.assert_close(average.tensors[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_run_keeps_measures_continues_and_exports_its_average(write_recipe, tmp_path: Path) -> None:
    settings = {"train": {"ema": 0.8}, "evaluation": {"ema": True}, "optimizer": {"name": "muon"}}
    train(load_recipe(str(write_recipe("whole", **settings))))
    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    recipe = load_recipe(str(write_recipe("parts", **settings)))
    train(recipe)
    cut_back(run, 4)
    train(recipe)
    expected, found = open_checkpoint(whole), open_checkpoint(run)
    for group in ("model", "optimizer", "ema"):
        assert found.names(group) == expected.names(group) != []
        for (name, a), (_, b) in zip(found.tensors(group), expected.tensors(group), strict=True):
            assert torch.equal(a, b), name
    measured = [line["eval_ema"] for line in read_jsonl(run / "metrics.jsonl") if "eval_ema" in line][-1]
    trained = [line["eval"] for line in read_jsonl(run / "metrics.jsonl") if "eval" in line][-1]
    assert measured["loss"] != pytest.approx(trained["loss"], rel=1e-3)
    assert main(["export", str(run), str(tmp_path / "averaged"), "--ema", "--to", "chatmill"]) == 0
    options = EvaluationOptions(sequence_length=128, generate=0, select=0)
    figures = evaluate_fully(tmp_path / "averaged", options, World(0, 1, 0, 1, torch.device("cpu"), "none"))
    assert figures.summary["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert main(["export", str(run), str(tmp_path / "hf"), "--ema"]) == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(exported["model.norm.weight"].float(), found.tensor("ema.norm.weight"))
    assert not list(tmp_path.glob(".*averaged*"))


def test_a_checkpoint_without_an_average_is_refused(write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(load_recipe(str(write_recipe("plain", train={"steps": 1}))))
    run = tmp_path / "runs" / "plain"
    assert main(["export", str(run), str(tmp_path / "out"), "--ema"]) == 2
    assert "trained without train.ema" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_average_cannot_be_added_to_a_run_that_has_none(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe("late", train={"steps": 1})
    train(load_recipe(str(recipe)))
    with pytest.raises(ConfigError, match=r"train\.ema: None -> 0\.9"):
        train(load_recipe(str(recipe), ["train.ema=0.9", "train.steps=2"]))
    folder = list_checkpoints(tmp_path / "runs" / "late")[-1]
    tuned = write_recipe("tuned", train={"steps": 1, "ema": 0.9}, model={"checkpoint": str(folder)})
    train(load_recipe(str(tuned)))  # a new run that starts from weights alone starts its average from them
    shutil.rmtree(tmp_path / "runs" / "late")
    first, average = (dict(open_checkpoint(tmp_path / "runs" / "tuned").tensors(g)) for g in ("model", "ema"))
    assert all((average[f"ema.{name}"] - first[name]).abs().max() < 0.02 for name in first)
