"""Mixing, curriculum, exclusion and budgets as recipe fields: what a run learns from, refuses, and remembers."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chatmill.config import ConfigError
from chatmill.data.packing.options import StreamOptions
from chatmill.data.packing.schedule import Schedule
from chatmill.data.packing.sources import open_mixture, record_exclusion
from chatmill.data.packing.usage import at, run_schedule, where
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.data.shards.dataset import TokenDataset
from chatmill.run_files import read_jsonl
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import load_recipe
from chatmill.trainer.evaluation.loss import pooled
from chatmill.trainer.loop.loop import train
from chatmill.trainer.optim.schedule import learning_rate
from chatmill.trainer.report.page import build_report

from ..conftest import cut_back, make_chats


@pytest.fixture(scope="session")
def other_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second, smaller data set with the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in make_chats(120, seed=9)), encoding="utf-8")
    recipe = {
        "name": "other",
        "out": str(folder / "other"),
        "sources": [{"format": "openai", "path": str(folder / "chats.jsonl")}],
        "split": {"validation": 0.1},
        "tokenizer": {"path": str(tiny_data / "tokenizer")},
        "shards": {"block_dialogues": 16},
    }
    build_dataset(DataRecipe.model_validate(recipe))
    return folder / "other"


@pytest.fixture
def mixed(write_recipe, tiny_data: Path, other_data: Path):
    """mixed(name, data fields, other sections) -> recipe over both data sets."""

    def recipe(name: str, data: dict[str, Any] | None = None, **sections: Any) -> Any:
        mix = [{"path": str(tiny_data), "weight": 3, "name": "main"}, {"path": str(other_data)}]
        return load_recipe(str(write_recipe(name, data={"mix": mix} | (data or {}), **sections)))

    return recipe


def packs_of(run: Path, step: int) -> dict[str, int]:
    """How many packs of a step came from each data set."""
    return dict(Counter({use.pack: use.data for use in at(run, step)}.values()))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def test_a_mix_with_a_curriculum_trains_as_its_weights_say_and_names_what_it_used(mixed, tmp_path: Path) -> None:
    recipe = mixed("mix", {"curriculum": [{"step": 4, "weights": {"other": 1}}]})
    train(recipe)
    run = tmp_path / "runs" / "mix"
    assert [packs_of(run, step) for step in range(1, 9)] == [{"main": 3, "other": 1}] * 4 + [{"other": 4}] * 4
    lines = {line["step"]: line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line}
    for step, line in lines.items():
        uses = at(run, step)
        assert (sum(u.tokens for u in uses), sum(u.loss_tokens for u in uses)) == (line["tokens"], line["loss_tokens"])
    use = at(run, 5)[0]
    assert 5 in [other.step for other in where(run, use.uid)]


def test_every_data_set_of_a_mix_is_measured_and_the_figures_are_those_of_all_tokens(
    mixed, tiny_data: Path, other_data: Path, tmp_path: Path
) -> None:
    train(mixed("both"))
    line = [x for x in read_jsonl(tmp_path / "runs/both/metrics.jsonl") if "eval" in x][-1]
    tokens = {path: int(TokenDataset.open(path, "validation").loss_tokens.sum()) for path in (tiny_data, other_data)}
    each = line["eval_by_data"]
    assert {name: figures["loss_tokens"] for name, figures in each.items()} == {
        "main": tokens[tiny_data],
        "other": tokens[other_data],
    }
    assert line["eval"]["loss_tokens"] == sum(tokens.values()) and line["eval"] == pooled(list(each.values()))
    low, high = sorted(figures["loss"] for figures in each.values())
    assert low < line["eval"]["loss"] < high
    train(mixed("one", evaluation={"data": ["other"]}))
    line = [x for x in read_jsonl(tmp_path / "runs/one/metrics.jsonl") if "eval" in x][-1]
    assert "eval_by_data" not in line and line["eval"]["loss_tokens"] == tokens[other_data]


def test_a_run_continues_with_new_exclusions_and_weights_to_come_but_not_with_another_past(mixed, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "past"
    train(mixed("past"))
    before = [[use.uid for use in at(run, step)] for step in range(1, 9)]
    first = losses(run)
    gone = before[4][0]
    cut_back(run, 4)
    with pytest.raises(ConfigError, match=r"cannot resume: excluded before step 4 was"):
        train(mixed("past", {"exclude": [{"step": 3, "uids": [gone]}]}))
    with pytest.raises(ConfigError, match=r"cannot resume: weights before step 4 was"):
        train(mixed("past", {"curriculum": [{"step": 3, "weights": {"main": 1}}]}))
    swapped = mixed("past").data.mix[::-1]
    with pytest.raises(ConfigError, match="cannot resume: data set 'main' is missing"):
        train(mixed("past", {"mix": [swapped[0].model_dump()]}))
    train(mixed("past", {"exclude": [{"step": 4, "uids": [gone]}], "curriculum": [{"step": 6, "weights": {"main": 1}}]}))
    after = [[use.uid for use in at(run, step)] for step in range(1, 9)]
    assert after[:4] == before[:4] and gone in before[4] and not any(gone in uids for uids in after[4:])
    assert [packs_of(run, step) for step in (6, 7, 8)] == [{"main": 3, "other": 1}, {"main": 4}, {"main": 4}]
    assert losses(run)[:4] == first[:4] and losses(run)[4:] != first[4:]
    assert open_checkpoint(run).meta["step"] == 8


def test_an_exclusion_recorded_in_the_run_folder_is_kept_by_every_later_attempt(mixed, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "spike"
    recipe = mixed("spike")
    train(recipe)
    _, states = run_schedule(run)
    assert [state.step for state in states] == [4, 8]
    bad = {use.uid for use in at(run, 6)}
    cut_back(run, 4)
    record_exclusion(run, 4, bad, reason="spike at 6")
    record_exclusion(run, 5, ["nobody"])
    train(recipe)
    assert not bad & {use.uid for step in (5, 6, 7, 8) for use in at(run, step)}
    train(recipe)  # finished: nothing to do, and its own checkpoint is accepted
    (run / "excluded.jsonl").write_text('{"step": 4, "uids": ["a"')
    with pytest.raises(ConfigError, match=r"excluded.jsonl:1: not an exclusion"):
        train(recipe)


@pytest.mark.parametrize(
    "budget", [{"epochs": 1}, {"tokens": 3000}, {"epochs": 1, "tokens": 3000}, {"epochs": 1, "steps": 5}], ids=str
)
def test_a_budget_is_counted_in_steps_and_ends_the_run(
    write_recipe, tiny_data: Path, tmp_path: Path, budget: dict[str, int]
) -> None:
    sections: dict[str, Any] = {"data": {"max_dialogues": 100}, "evaluation": {"at_end": False}}
    path = write_recipe("budget", **sections)
    path.write_text(path.read_text().replace("  steps: 8\n", ""))
    words = [f"train.{key}={value}" for key, value in budget.items()]
    recipe = load_recipe(str(path), words)
    assert train(recipe) > 2
    run = tmp_path / "runs" / "budget"
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    tokens = [line["tokens"] for line in lines]
    if "tokens" in budget:
        assert sum(tokens[:-1]) < budget["tokens"] <= sum(tokens)
    elif "steps" in budget:
        assert len(lines) == 5
    else:
        dataset = TokenDataset.open(tiny_data, "train")
        used = Counter(use.uid for step in range(1, len(lines) + 1) for use in at(run, step))
        short = [dataset.uid(i) for i in range(100) if dataset.lengths[i] <= 128]
        assert set(used.values()) == {1} and set(short) <= set(used)
    steps = len(lines)
    expected = [learning_rate(step, steps, recipe.optimizer.lr, recipe.schedule) for step in range(steps)]
    assert [line["lr"] for line in lines] == expected  # the schedule knew where the end would be
    assert train(recipe) == steps


def test_the_last_epoch_is_the_end_of_a_schedule_by_tokens(write_recipe, tmp_path: Path) -> None:
    by_tokens = {"unit": "tokens", "warmup_steps": 0, "warmup_tokens": 500, "min_ratio": 0.0}
    path = write_recipe("falling", data={"max_dialogues": 60}, evaluation={"at_end": False}, schedule=by_tokens)
    path.write_text(path.read_text().replace("  steps: 8\n", ""))
    recipe = load_recipe(str(path), ["train.epochs=1"])
    run = tmp_path / "runs" / "falling"
    steps = train(recipe)
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    seen = list(itertools.accumulate(line["tokens"] for line in lines))
    expected = [learning_rate(0, 1, recipe.optimizer.lr, recipe.schedule, tokens, seen[-1]) for tokens in seen]
    assert [line["lr"] for line in lines] == expected
    assert expected[-1] == 0.0 < expected[-2]
    cut_back(run, 4)  # the same command goes on with the same end in sight
    assert train(recipe) == steps > 4
    assert [line["lr"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line] == expected
    with pytest.raises(ConfigError, match=r"warmup_tokens=9000000 leaves nothing of the run's"):
        train(load_recipe(str(path), ["train.epochs=1", "run.name=long", "schedule.warmup_tokens=9000000"]))


def test_an_epoch_with_less_left_than_was_counted_ends_in_order(
    write_recipe, other_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatmill.data.packing.order.WINDOW_DIALOGUES", 30)
    monkeypatch.setattr("chatmill.data.packing.order.WINDOW_PACKS", 1)
    run = tmp_path / "runs" / "less"
    recipe = load_recipe(str(write_recipe("less", data={"path": str(other_data)}, train={"epochs": 1, "steps": 1000})))
    steps = train(recipe)
    assert 8 < steps < 100
    dataset = TokenDataset.open(other_data, "train")
    cut_back(run, 4)
    record_exclusion(run, 4, [dataset.uid(i) for i in range(0, len(dataset), 2)])
    fewer = train(recipe)
    assert 4 < fewer < steps
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line] == list(range(1, fewer + 1))
    assert open_checkpoint(run).meta["step"] == fewer and train(recipe) == fewer


@pytest.mark.parametrize(("overlong", "fate"), [("truncate", "truncated"), ("split", "split"), ("drop", "dropped")])
def test_what_became_of_dialogues_longer_than_a_pack_is_in_the_metrics_and_the_report(
    write_recipe, tiny_data: Path, tmp_path: Path, overlong: str, fate: str
) -> None:
    data = {"sequence_length": 64, "overlong": overlong, "overlap": 4 if overlong == "split" else 0}
    recipe = load_recipe(str(write_recipe("long", data=data, train={"steps": 2})))
    train(recipe)
    run = tmp_path / "runs" / "long"
    lengths = TokenDataset.open(tiny_data, "train").lengths
    long = [line["overlong"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line][-1]
    assert long["dialogues"] == len(lengths) and long["overlong"] == int((lengths > 64).sum()) > 0
    assert long["truncated"] + long["split"] + long["dropped"] == long["overlong"] and long[fate] > 0
    page = build_report(run).read_text()
    assert f"{long['overlong']:,} of {long['dialogues']:,} dialogues planned" in page


def test_the_order_in_which_a_recipe_lists_its_data_sets_does_not_matter(mixed) -> None:
    recipe = mixed("order")
    turned = mixed("order", {"mix": [item.model_dump() for item in recipe.data.mix[::-1]]})
    options = StreamOptions(sequence_length=128, global_batch=4)
    one, other = (Schedule(open_mixture(recipe.data), options) for recipe in (recipe, turned))
    first, second = ([[pack.uids() for pack in plan.packs] for plan in itertools.islice(s.steps(), 8)] for s in (one, other))
    assert first == second and one.mixture.fingerprint == other.mixture.fingerprint


def test_impossible_mixes_are_refused_in_words(mixed, write_recipe, tiny_data: Path, tmp_path: Path) -> None:
    path = str(tiny_data)
    for data, message in (
        ({"mix": [{"path": path}, {"path": path}]}, "two data sets are called"),
        ({"mix": [], "curriculum": [{"step": 2, "weights": {"data": 1}}]}, "list them in mix"),
        ({"curriculum": [{"step": 2, "weights": {"mian": 1}}]}, "no data set 'mian'"),
        ({"curriculum": [{"step": 2, "weights": {"main": 0}}]}, "not all 0"),
        ({"curriculum": [{"step": 3, "weights": {"main": 1}}, {"step": 2, "weights": {"main": 1}}]}, "steps must rise"),
        ({"exclude": [{"step": 2}]}, "needs uids or a file"),
    ):
        with pytest.raises(ConfigError, match=message):
            mixed("no", data)
    with pytest.raises(ConfigError, match=r"data\.exclude: .*gone\.txt does not exist"):
        train(mixed("no", {"exclude": [{"file": str(tmp_path / "gone.txt")}]}))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for part in tiny_data.iterdir():
        (foreign / part.name).symlink_to(part)
    (foreign / "manifest.json").unlink()
    manifest = json.loads((tiny_data / "manifest.json").read_text()) | {"template_sha256": "other"}
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="different template_sha256"):
        train(mixed("no", {"mix": [{"path": path}, {"path": str(foreign)}]}))


def test_a_file_of_ids_excludes_them_from_the_start(write_recipe, tiny_data: Path, tmp_path: Path) -> None:
    uid = TokenDataset.open(tiny_data, "train").uid(3)
    (tmp_path / "bad.txt").write_text(f"{uid}\n\n")
    recipe = load_recipe(str(write_recipe("file", data={"exclude": [{"file": str(tmp_path / "bad.txt")}]})))
    train(recipe)
    assert where(tmp_path / "runs" / "file", uid) == []
