"""Figures of a run: every field of metrics.jsonl, trackers beside it, the profiler on request."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import pytest
import torch

from chatmill.config import ConfigError
from chatmill.data.stream import PackedBatch
from chatmill.run_files import read_jsonl
from chatmill.trainer.config import ModelConfig, load_recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.loop.loop import train
from chatmill.trainer.run.meter import StepMeter
from chatmill.trainer.run.trackers import Trackers

from ..conftest import cut_back

ROOT = Path(__file__).resolve().parents[3]
SHAPE = ModelConfig(vocab_size=100, hidden_size=16, intermediate_size=32, layers=2, heads=2, kv_heads=1, context=64)


def documented() -> set[str]:
    """Fields that docs/metrics.md explains."""
    return set(re.findall(r"^\| `(\w+)` ", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE))


def batch(lengths: list[int], loss_tokens: int, step_tokens: int) -> PackedBatch:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    empty = torch.zeros(int(ends[-1]), dtype=torch.int32)
    counts = {"loss_tokens": loss_tokens, "n_tokens": step_tokens}
    counts |= {"step_loss_tokens": 2 * loss_tokens, "step_tokens": 2 * step_tokens}
    return PackedBatch(empty, empty.long(), empty, ends, empty, max(lengths), **counts, uids=())


def test_the_figures_of_a_line_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    meter = StepMeter(SHAPE, World(0, 2, 0, 2, torch.device("cpu"), "gloo"))
    meter._peak = 1e6
    meter.waited(1.0)
    meter.stepped([batch([10, 30], loss_tokens=12, step_tokens=36)])
    line = meter.line(step=1, loss=2.0, lr=0.1, grad_norm=1.0, total_tokens=72)
    assert line["tokens_per_s"] == 72 / 4
    assert line["tokens_per_s_per_device"] == 72 / 4 / 2
    assert line["loss_share"] == pytest.approx(12 / 36)
    assert line["padding_share"] == pytest.approx(1 - 72 / 80)
    assert line["data_wait_share"] == 0.25
    matrices = 2 * (16 * (16 + 2 * 8) + 16 * 16 + 3 * 16 * 32)
    attention = 6 * 2 * 2 * 8 * (10 * 10 + 30 * 30) / 40
    whole = (6 * (matrices + 100 * 16) + attention) * 9
    required = (6 * (matrices + 100 * 16 * 12 / 36) + attention) * 9
    assert line["tflops_per_device"] == pytest.approx(whole / 1e12)
    assert line["required_tflops_per_device"] == pytest.approx(required / 1e12)
    assert line["mfu"] == pytest.approx(whole / 1e6)
    assert line["required_mfu"] == pytest.approx(required / 1e6)
    assert line["memory_peak_bytes"] > 1 << 20


def test_every_field_that_is_written_is_explained(write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("fields", train={"steps": 2}, evaluation={"at_start": True}))))
    lines = list(read_jsonl(tmp_path / "runs" / "fields" / "metrics.jsonl"))
    written = {key for line in lines for key in line}
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "memory_peak_bytes", "eval"} <= written
    assert written <= documented()
    assert {"mfu", "required_mfu", "memory_reserved_bytes"} <= documented()


def test_tensorboard_has_the_curves_and_no_step_twice_after_a_resume(write_recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = load_recipe(str(write_recipe("board", logging={"trackers": ["tensorboard"]}, evaluation={"at_end": True})))
    run = tmp_path / "runs" / "board"
    train(recipe)
    cut_back(run, 4)
    train(recipe)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = {line["step"]: line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line}
    shown = events.Scalars("loss")
    assert [event.step for event in shown] == sorted(losses)
    assert [event.value for event in shown] == pytest.approx([losses[event.step] for event in shown], rel=1e-6)
    assert "eval/perplexity" in events.Tags()["scalars"]


class Notebook(accelerate.tracking.GeneralTracker):
    """A user's own tracker."""

    name = "notebook"
    requires_logging_directory = False
    seen: list = []  # noqa: RUF012

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.run_name = run_name

    @property
    def tracker(self) -> list:
        return self.seen

    def store_init_configuration(self, values: dict) -> None:
        self.seen.append(("settings", self.run_name, values["optimizer/lr"]))

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        if step == 3:
            raise ConnectionError("the network is gone")
        self.seen.append((step, values["loss"]))

    def finish(self) -> None:
        self.seen.append("finished")


def test_any_of_accelerate_s_trackers_gets_the_lines_and_cannot_stop_the_run(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Notebook, "seen", [])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    settings = {"train": {"steps": 2}, "evaluation": {"at_end": False}, "logging": {"trackers": ["notebook"]}}
    train(load_recipe(str(write_recipe("noted", **settings))))
    lines = list(read_jsonl(tmp_path / "runs" / "noted" / "metrics.jsonl"))
    expected = [("settings", "noted", 5e-3), (1, lines[0]["loss"]), (2, lines[1]["loss"]), "finished"]
    assert Notebook.seen == expected
    settings["train"]["steps"] = 5
    train(load_recipe(str(write_recipe("broken", **settings))))
    assert len(list(read_jsonl(tmp_path / "runs" / "broken" / "metrics.jsonl"))) == 5
    assert capsys.readouterr().err.count("the network is gone") == 1


@pytest.mark.parametrize(("name", "why"), [("abacus", "unknown"), ("wandb", "not installed")])
def test_a_tracker_that_is_not_there_is_named_before_the_run(
    name: str, why: str, write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=why):
        train(load_recipe(str(write_recipe("none", logging={"trackers": [name]}))))
    assert not (tmp_path / "runs" / "none" / "metrics.jsonl").exists()


def test_the_asked_steps_are_profiled(write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("seen", train={"steps": 4}, logging={"profile_steps": [2, 3]}))))
    folder = tmp_path / "runs" / "seen" / "profile"
    table = (folder / "operators.txt").read_text()
    assert table.startswith("steps 2 to 3\n") and "attention" in table
    events = json.loads((folder / "trace-rank0.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" and event.get("ph") == "X" for event in events) == 2
    with pytest.raises(ConfigError, match="profile_steps"):
        load_recipe(str(write_recipe("wrong", logging={"profile_steps": [3, 2]})))


class Page(accelerate.tracking.GeneralTracker):
    """Stands for MLflow's and trackio's trackers: notes how it was made, and has an id as an MLflow run has one."""

    name, requires_logging_directory, main_process_only = "page", False, False
    made: list = []  # noqa: RUF012

    def __init__(self, project: str, **options: object) -> None:
        super().__init__()
        self.options = options
        self.made.append((project, options))

    @property
    def tracker(self) -> SimpleNamespace:
        return SimpleNamespace(info=SimpleNamespace(run_id="f00"))

    def store_init_configuration(self, values: dict) -> None:
        self.made.append("settings")

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        pass


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_resumed_run_continues_its_page(name: str, write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Page, "made", [])
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [name])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, Page)
    recipe = load_recipe(str(write_recipe("paged", logging={"trackers": [name]})))
    for step in (1, 5):
        trackers = Trackers(recipe, tmp_path, is_main=True)
        trackers.log({"step": step, "loss": 1.0})
        trackers.close()
    if name == "mlflow":  # settings are not sent again: MLflow refuses one that changed
        begun = ("chatmill", {"run_name": "paged", "run_id": None})
        assert Page.made == [begun, "settings", ("chatmill", {"run_name": "paged", "run_id": "f00"})]
    else:
        page = ("chatmill", {"name": "paged-" + json.loads((tmp_path / "trackers.json").read_text())[name], "resume": "allow"})
        assert Page.made == [page, "settings"] * 2
