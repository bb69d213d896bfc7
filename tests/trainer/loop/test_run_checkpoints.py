"""Which checkpoints a run keeps, which it continues from, and what `chatmill checkpoint` says of them."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from chatmill.config import ConfigError
from chatmill.data.shards.dataset import TokenDataset
from chatmill.launcher.__main__ import main as chatmill
from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.checkpoint.checkpoint import best_of, open_checkpoint
from chatmill.trainer.config import load_recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.evaluation import evaluate as full_evaluation
from chatmill.trainer.evaluation.loss import evaluate, pooled, validation_batches
from chatmill.trainer.loop import validation
from chatmill.trainer.loop.loop import train
from chatmill.trainer.model.decoder import Decoder, LossOutput
from chatmill.trainer.run.state import TrainState

from ..conftest import cut_back


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_run_continues_from_the_newest_good_checkpoint_and_keeps_it(write_recipe, tmp_path: Path, capsys) -> None:
    """keep=1 after a fallback: were the damaged ones still counted, pruning would delete the only good one."""
    recipe = write_recipe("run", checkpoint={"every_steps": 2, "keep": 3})
    train(load_recipe(str(recipe)))
    run = tmp_path / "runs" / "run"
    whole = losses(run)
    newest = list_checkpoints(run)
    assert [p.name for p in newest] == ["step-00000004", "step-00000006", "step-00000008"]
    flip(newest[2] / "manifest.json")
    flip(newest[1] / "optimizer-rank0000-001.safetensors")
    capsys.readouterr()
    train(load_recipe(str(recipe), ["checkpoint.keep=1", "checkpoint.every_steps=5"]))
    said = capsys.readouterr().out
    assert "manifest.json" in said
    assert "optimizer-rank0000-001.safetensors: contents differ" in said
    (event,) = [e for e in read_jsonl(run / "events.jsonl") if e["event"] == "damaged_checkpoint"]
    assert event["using"] == "step-00000004"
    assert losses(run) == whole
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000008"]
    assert open_checkpoint(run).meta["lineage"][-1]["step"] == 4


def worsening(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the validations measure these losses, one after the other."""
    figures = iter(values)

    def measured(*arguments: Any) -> dict[str, float]:
        value = next(figures)
        return {"loss": value, "perplexity": 1.0, "accuracy": 1.0 / value, "loss_tokens": 1}

    monkeypatch.setattr(validation, "evaluate", measured)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_checkpoint_outlives_the_newest_ones(write_recipe, tmp_path: Path, monkeypatch, metric: str) -> None:
    worsening(monkeypatch, [5.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    recipe = write_recipe(
        "best", evaluation={"every_steps": 1}, checkpoint={"every_steps": 4, "keep": 1, "best": metric, "keep_every_steps": 4}
    )
    train(load_recipe(str(recipe)))
    run = tmp_path / "runs" / "best"
    note = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (note["checkpoint"], note["metric"]) == ("step-00000002", metric)
    assert [p.name for p in list_checkpoints(run)] == [f"step-{s:08d}" for s in (2, 4, 8)]
    assert open_checkpoint(best_of(run)).meta["step"] == 2
    measured: list[str] = []
    monkeypatch.setattr(full_evaluation, "run_evaluation", lambda path, *rest: measured.append(path) or 0)
    assert chatmill(["eval", str(run), "--best"]) == 0
    assert measured == [str(run / "checkpoints" / "step-00000002")]


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_that_is_not_a_number_is_never_the_best(metric: str, bad: float) -> None:
    """Nothing is smaller than NaN, so a first one stayed the best for ever; a model of NaNs may still have an accuracy."""
    state = TrainState()
    told = []
    for step, (loss, accuracy) in enumerate([(bad, 0.9), (3.0, 0.2), (bad, 0.9), (2.0, 0.3), (2.5, 0.25)], 1):
        state.step = step
        told.append(state.validated({"loss": loss, "accuracy": accuracy}, metric))
    assert told == [False, True, False, True, False]
    assert (state.best_step, state.stale_validations) == (4, 1)
    kept, _ = TrainState.from_json(json.dumps({"best_value": bad, "best_step": 3, "stream": {}}))
    assert (kept.best_value, kept.best_step) == (None, -1)  # a run that version 0.1 began


def test_a_run_gets_rid_of_a_best_checkpoint_that_was_not_a_number(write_recipe, tmp_path: Path, monkeypatch) -> None:
    worsening(monkeypatch, [math.nan, math.nan, 5.0, 6.0, 7.0])
    recipe = write_recipe("best", evaluation={"every_steps": 2}, checkpoint={"every_steps": 2, "keep": 9, "best": "loss"})
    train(load_recipe(str(recipe)))
    run = tmp_path / "runs" / "best"
    assert open_checkpoint(best_of(run)).meta["step"] == 6
    cut_back(run, 4)
    (run / "checkpoints" / "best.json").write_text('{"checkpoint": "step-00000002", "value": NaN}')
    worsening(monkeypatch, [math.nan, math.nan])
    train(load_recipe(str(recipe)))
    with pytest.raises(ConfigError, match="names no best checkpoint"):
        best_of(run)


def test_the_perplexity_of_not_a_number_is_none() -> None:
    figures = [{"loss": loss, "accuracy": 0.0, "loss_tokens": 1.0} for loss in (math.nan, 1.0)]
    assert math.isnan(pooled(figures)["perplexity"])
    assert pooled([figures[1], figures[1] | {"loss": 5000.0}])["perplexity"] == math.inf


def test_a_run_without_progress_stops_early_and_stays_stopped(write_recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    worsening(monkeypatch, [3.0, 4.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    recipe = write_recipe("early", evaluation={"every_steps": 1, "patience": 2})
    assert train(load_recipe(str(recipe))) == 3
    run = tmp_path / "runs" / "early"
    assert list(read_jsonl(run / "events.jsonl"))[-1] | {"time": 0} == {
        "time": 0,
        "event": "finished",
        "step": 3,
        "tokens": list(read_jsonl(run / "metrics.jsonl"))[-2]["total_tokens"],
        "loss_tokens": open_state(run)["loss_tokens"],
        "early_stop": True,
    }
    assert train(load_recipe(str(recipe))) == 3
    assert "raise evaluation.patience" in capsys.readouterr().out
    assert train(load_recipe(str(recipe), ["evaluation.patience=4"])) == 8


def open_state(run: Path) -> dict[str, Any]:
    return dict(json.loads(open_checkpoint(run).files()["state.json"].read_text()))


class Meeting:
    """Ranks as threads: what World.gather and World.any need of a process group."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        self.values: list[Any] = [None] * world_size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(60)
        found = list(self.values)
        self.barrier.wait(60)
        return found


class ThreadWorld(World):
    """A World whose ranks are threads of this process."""

    meeting: Meeting

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.rank, value)

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))


def test_validation_gives_the_same_bits_for_any_number_of_ranks(write_recipe, tiny_data: Path) -> None:
    model = Decoder(load_recipe(str(write_recipe("shape"))).model.shape())
    model.init_weights(3)
    model.eval()
    dataset = TokenDataset.open(tiny_data, "validation")

    def forward(batch: Any) -> LossOutput:
        output: LossOutput = model(
            batch.tokens, batch.positions, batch.cu_seqlens, targets=batch.targets, rows=batch.rows, max_seqlen=batch.max_seqlen
        )
        return output

    results = []
    for world_size in (1, 2, 3, 5):
        meeting = Meeting(world_size)
        found: list[Any] = [None] * world_size

        def rank_of(rank: int, size: int = world_size, meeting: Meeting = meeting, found: list[Any] = found) -> None:
            world = ThreadWorld(rank, size, rank, size, torch.device("cpu"), "none")
            object.__setattr__(world, "meeting", meeting)
            batches = validation_batches(dataset, sequence_length=128, micro_batch=1, world=world)
            found[rank] = evaluate(forward, batches, world)

        threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert all(figures == found[0] for figures in found)
        results.append(found[0])
    assert results[0]["loss_tokens"] > 500
    assert all(figures == results[0] for figures in results)


def test_the_command_lists_verifies_and_compares(write_recipe, tmp_path: Path, capsys) -> None:
    recipe = write_recipe("one", checkpoint={"every_steps": 4})
    train(load_recipe(str(recipe)))
    train(load_recipe(str(recipe), ["run.name=two"]))
    train(load_recipe(str(recipe), ["run.name=three", "train.seed=1"]))
    one, two, three = (str(tmp_path / "runs" / name) for name in ("one", "two", "three"))
    capsys.readouterr()

    assert chatmill(["checkpoint", "ls", one]) == 0
    out = capsys.readouterr().out
    assert "step-00000004" in out
    assert "single x 1" in out
    assert out.count("complete") == 2

    assert chatmill(["checkpoint", "diff", one, two]) == 0
    assert "equal bit for bit" in capsys.readouterr().out
    assert chatmill(["checkpoint", "diff", one, three, "--limit", "100"]) == 1
    out = capsys.readouterr().out
    a, b = (dict(open_checkpoint(run).tensors()) for run in (one, three))
    largest = float((a["norm.weight"] - b["norm.weight"]).abs().max())
    line = next(line for line in out.splitlines() if line.startswith("norm.weight "))
    assert float(line.split()[1]) == pytest.approx(largest, rel=1e-3)
    assert float(line.split()[2]) == pytest.approx(largest / float(b["norm.weight"].abs().max()), rel=1e-3)

    assert chatmill(["checkpoint", "verify", one]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    flip(list_checkpoints(one)[0] / "state.json")
    assert chatmill(["checkpoint", "verify", one]) == 1
    assert "step-00000004/state.json: contents differ" in capsys.readouterr().out
    (list_checkpoints(one)[0] / "state.json").unlink()
    assert chatmill(["checkpoint", "ls", one]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert chatmill(["checkpoint", "verify", str(tmp_path)]) == 2
