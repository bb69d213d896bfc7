"""Steps that cannot be right: found, decided alike on every rank, and nothing learned from them."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatmill.config import ConfigError
from chatmill.data.packing.sources import recorded_exclusions
from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.checkpoint.saver import CheckpointSaver
from chatmill.trainer.config import GuardSection, load_recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.engine import StepSums
from chatmill.trainer.engine.torch_engine import TorchEngine
from chatmill.trainer.loop.loop import train
from chatmill.trainer.run.folder import RunFolder
from chatmill.trainer.run.guard import Guard, robust_z
from chatmill.trainer.run.state import TrainState


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run / "events.jsonl") if line["event"] == kind]


class Injector:
    """Stands in for Engine.forward_backward: notes what each step saw, spoils the steps that it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: dict[int, float], gradient_only: bool = False) -> None:
        self.seen: list[set[str]] = []
        real = TorchEngine.forward_backward

        def forward_backward(engine: TorchEngine, batches: Any) -> StepSums:
            sums = real(engine, batches)
            self.seen.append({uid for batch in batches for uid in batch.uids})
            factor = spoil.get(len(self.seen), 1.0)
            if factor != 1.0:
                parameter = next(engine.decoder.parameters())
                assert parameter.grad is not None
                parameter.grad *= factor
            return StepSums(sums.loss_sum * (1.0 if gradient_only else factor), sums.correct)

        monkeypatch.setattr(TorchEngine, "forward_backward", forward_backward)


def test_the_z_score_is_numpys_and_is_not_moved_by_one_outlier() -> None:
    rng = np.random.default_rng(0)
    history = list(rng.normal(3.0, 0.1, 101))
    middle = np.median(history)
    expected = (3.7 - middle) / (1.4826 * np.median(np.abs(np.array(history) - middle)))
    found = robust_z(3.7, history, 32)
    assert found == pytest.approx(expected)
    spoiled = robust_z(3.7, [*history[:-1], 1e6], 32)
    assert spoiled == pytest.approx(expected, rel=0.1)
    assert robust_z(3.7, history[:31], 32) is None
    assert robust_z(2.0, [2.0] * 40, 32) == 0.0
    assert (robust_z(3.0, [2.0] * 40, 32) or 0) > 100


@pytest.mark.parametrize(
    ("losses", "loss", "warned"),
    [
        ([7.6], 11.1, True),
        ([7.6, 7.5, 7.4], 11.1, True),
        ([7.6], 8.5, False),  # a harder batch
        ([2.0], 6.0, False),  # better than guessing: batches of a fine-tuning differ
        ([], 11.1, False),
        ([7.6, 11.1], 11.3, False),  # said already
        ([7.6] * 40, 11.1, True),  # from here on by its history
    ],
)
def test_a_start_with_too_high_a_learning_rate_is_warned_of(
    losses: list[float], loss: float, warned: bool, tmp_path: Path
) -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"), "none")
    guard = Guard(GuardSection(), RunFolder(tmp_path / "r"), world, guessing=math.log(2048))
    found = guard.judge_loss(loss, TrainState(losses=losses))
    assert (found is not None) == warned and (found is None or found.action == "warn")
    said: list[str] = []
    guard.decide(found, loss, TrainState(step=2, losses=losses), [], said.append)
    assert len(said) == warned and all("warning: step 2" in line for line in said)
    assert Guard(GuardSection(), guard.folder, world).judge_loss(99.0, TrainState(losses=[1.0])) is None  # preferences


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_with_nan_is_left_out_and_its_dialogues_are_named(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradient_only: bool
) -> None:
    injector = Injector(monkeypatch, {3: math.nan}, gradient_only)
    train(load_recipe(str(write_recipe("nan", checkpoint={"every_steps": 1, "keep": 9}))))
    run = tmp_path / "runs" / "nan"
    (event,) = events(run, "skipped_step")
    assert (event["step"], event["kind"], event["value"]) == (3, "nan", "nan")
    assert set(event["uids"]) == injector.seen[2]
    before, after = (dict(open_checkpoint(folder).tensors()) for folder in list_checkpoints(run)[1:3])
    assert all(torch.equal(before[name], after[name]) for name in before), "the weights changed in the step left out"
    assert len(losses(run)) == 8
    assert all(math.isfinite(x) for i, x in enumerate(losses(run)) if i != 2)


def test_too_many_nans_in_a_row_stop_the_run_with_the_reason(write_recipe, tmp_path: Path, monkeypatch) -> None:
    Injector(monkeypatch, dict.fromkeys(range(3, 99), math.nan))
    recipe = write_recipe("hopeless", guard={"max_skips": 2})
    with pytest.raises(ConfigError, match=r"stopped at step 5: the loss is nan; 2 updates in a row"):
        train(load_recipe(str(recipe)))
    assert len(events(tmp_path / "runs" / "hopeless", "skipped_step")) == 3
    assert events(tmp_path / "runs" / "hopeless", "stopped")[0]["step"] == 5


GUARD = {"min_history": 4, "spike_z": 50.0}


def test_a_spike_is_only_warned_of_by_default(write_recipe, tmp_path: Path, monkeypatch) -> None:
    assert GuardSection().on_spike == "warn"
    injector = Injector(monkeypatch, {7: 1e3})
    train(load_recipe(str(write_recipe("warned", guard=GUARD))))
    (event,) = events(tmp_path / "runs" / "warned", "loss_spike")
    assert event["step"] == 7
    assert event["z"] > 50
    assert set(event["uids"]) == injector.seen[6]


def test_a_spike_rolls_back_and_the_run_goes_on_as_one_that_excluded_those_dialogues(
    write_recipe, tmp_path: Path, monkeypatch
) -> None:
    settings = {"train": {"steps": 12}, "checkpoint": {"every_steps": 4}}
    injector = Injector(monkeypatch, {7: 1e3})
    train(load_recipe(str(write_recipe("spiked", guard={**GUARD, "on_spike": "rollback"}, **settings))))
    run = tmp_path / "runs" / "spiked"
    (event,) = events(run, "rollback")
    assert (event["step"], event["to_step"]) == (7, 4)
    ((step, uids),) = recorded_exclusions(run)
    assert (step, uids) == (4, injector.seen[6])
    later = injector.seen[7:]
    assert len(later) == 8, "steps 5 to 12 were done anew"
    assert not any(uids & batch for batch in later)
    monkeypatch.undo()
    excluded = {"exclude": [{"step": 4, "uids": sorted(uids)}]}
    train(load_recipe(str(write_recipe("clean", data=excluded, **settings))))
    assert losses(run) == losses(tmp_path / "runs" / "clean")


def test_a_run_that_is_continued_after_a_roll_back_keeps_its_exclusions(write_recipe, tmp_path: Path, monkeypatch) -> None:
    Injector(monkeypatch, {7: 1e3})
    settings = {"guard": {**GUARD, "on_spike": "rollback"}, "checkpoint": {"every_steps": 4}, "train": {"steps": 12}}
    recipe = write_recipe("again", **settings)
    train(load_recipe(str(recipe)))
    run = tmp_path / "runs" / "again"
    whole = losses(run)
    monkeypatch.undo()
    from ..conftest import cut_back

    cut_back(run, 8)
    (run / "events.jsonl").write_text("")
    train(load_recipe(str(recipe)))
    assert losses(run) == whole


@pytest.mark.parametrize("bad_step", [5, 9])
def test_a_roll_back_waits_for_a_checkpoint_that_is_still_being_written(
    write_recipe, tmp_path: Path, monkeypatch, bad_step: int
) -> None:
    write = CheckpointSaver._write

    def slow(*arguments) -> str:
        time.sleep(1.0)
        return write(*arguments)

    monkeypatch.setattr(CheckpointSaver, "_write", slow)
    Injector(monkeypatch, {bad_step: 1e3})
    settings = {"guard": {**GUARD, "on_spike": "rollback"}, "checkpoint": {"every_steps": 4}, "train": {"steps": 12}}
    recipe = write_recipe("slow", **settings)
    train(load_recipe(str(recipe)))
    run = tmp_path / "runs" / "slow"
    (event,) = events(run, "rollback")
    assert (event["step"], event["to_step"]) == (bad_step, bad_step - 1)
    monkeypatch.undo()
    train(load_recipe(str(recipe)))  # a start reads the checkpoints and the exclusions again: they agree


def test_a_roll_back_before_the_first_checkpoint_says_that_it_is_only_a_skip(
    write_recipe, tmp_path: Path, monkeypatch, capsys
) -> None:
    Injector(monkeypatch, {7: 1e3})
    settings = {"guard": {**GUARD, "on_spike": "rollback"}, "checkpoint": {"every_steps": 10}, "train": {"steps": 12}}
    train(load_recipe(str(write_recipe("early", **settings))))
    (event,) = events(tmp_path / "runs" / "early", "no_rollback")
    assert event["step"] == 7
    assert "step 7: there is no checkpoint to go back to" in "".join(capsys.readouterr())
    assert not events(tmp_path / "runs" / "early", "rollback")


def test_a_run_is_rolled_back_only_so_often(write_recipe, tmp_path: Path, monkeypatch) -> None:
    Injector(monkeypatch, dict.fromkeys(range(7, 99), 1e3))
    recipe = write_recipe("endless", guard={**GUARD, "on_spike": "rollback", "max_rollbacks": 2})
    with pytest.raises(ConfigError, match="rolled back 2 times"):
        train(load_recipe(str(recipe)))
    assert len(events(tmp_path / "runs" / "endless", "rollback")) == 2
