"""What shows the way: help, hints at typos, completion, schemas, the table of recipes; and answers that come at once."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatmill.config import dump_yaml
from chatmill.launcher.__main__ import build_parser, main
from chatmill.launcher.commands.arguments import RECIPES
from chatmill.launcher.commands.schema import schema_of
from chatmill.launcher.jobs import launch as launching
from chatmill.launcher.jobs import recipe_table
from chatmill.trainer.config import Recipe, load_recipe
from chatmill.trainer.run.finished import finished_note

SHIPPED = [file for folder in RECIPES.values() for file in sorted(folder.glob("*.yaml"))]
LINE = "# yaml-language-server: $schema=schema.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "tiny"], "'trian' is not known; did you mean 'train'?"),
        (["data", "buld", "x"], "'buld' is not known; did you mean 'build'?"),
        (["launch", "tiny", "--on", "slrum"], "'slrum' is not known; did you mean 'slurm'?"),
        (["logs", "r", "--folow"], "--folow: no such option; did you mean --follow?"),
        (["status", "--zzz"], "--zzz: no such option"),
        (["help", "data", "buld"], "did you mean 'build'?"),
    ],
)
def test_a_typo_is_named_with_what_was_meant(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0 and "from raw conversations" in capsys.readouterr().out.lower()
    assert main(["help", "data", "verify"]) == 0
    assert "--quarantine" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["train", "tinny"], ["launch", "tinny"], ["plan", "tinny"], ["data", "build", "chitchatt"]])
def test_a_typo_in_a_recipes_name_is_named_before_anything_slow_is_imported(words: list[str], tmp_path: Path) -> None:
    program = f"import sys; from chatmill.launcher.__main__ import main\ncode = main({words!r}); print(code, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    code, *loaded = done.stdout.split()
    assert code == "2" and not {"torch", "numpy", "pydantic", "yaml", "rich"} & set(loaded)
    assert f"Did you mean {words[-1][:2]}"[:-2] in done.stderr and ("'tiny'" in done.stderr or "'chitchat'" in done.stderr)


def finished_run(folder: Path, steps: int = 3, **event: Any) -> list[str]:
    """The words of a training whose run folder says that it ended."""
    words = [f"run.dir={folder}", "run.name=r", f"train.steps={steps}"]
    run = folder / "r"
    checkpoint = run / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"1234")
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"weights": {"bytes": 4}}}))
    (run / "config.yaml").write_text(dump_yaml(load_recipe("tiny", words)))
    (run / "events.jsonl").write_text(json.dumps({"event": "finished", "step": 3} | event) + "\n")
    return ["train", "tiny", *words]


def test_a_finished_run_says_so_before_torch_is_imported(tmp_path: Path) -> None:
    words = finished_run(tmp_path)
    program = (
        f"import sys; from chatmill.launcher.__main__ import main\ncode = main({words!r}); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "r is finished: 3 of 3 steps." in done.stdout and done.stdout.endswith("0 False\n")


def test_what_is_not_surely_finished_is_left_to_the_training(tmp_path: Path) -> None:
    def note(words: list[str]) -> str | None:
        return finished_note(load_recipe(words[1], words[2:]))

    words = finished_run(tmp_path / "a")
    assert note(words) is not None
    assert note([*words, "train.steps=9"]) is None
    assert note([*words, "train.epochs=2"]) is None  # another budget: the training says what differs
    (tmp_path / "a/r/checkpoints/step-00000003/weights").write_bytes(b"12")
    assert note(words) is None  # a checkpoint that is not whole
    assert note(finished_run(tmp_path / "b", steps=9)) is None  # it ended earlier
    assert note(finished_run(tmp_path / "c", steps=9, early_stop=True)) is None  # patience was taken out
    again = finished_run(tmp_path / "d")
    with (tmp_path / "d/r/events.jsonl").open("a") as events:
        events.write('{"event": "resume", "step": 3}\n')
    assert note(again) is None


def test_another_recipe_in_the_folder_of_a_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*finished_run(tmp_path), "optimizer.lr=0.5"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["train", "data"])
def test_the_schemas_beside_the_recipes_are_those_of_today(kind: str) -> None:
    folder = RECIPES["data" if kind == "data" else "trainer"]
    assert (folder / "schema.json").read_text(encoding="utf-8") == schema_of(kind), (
        f"chatmill schema {kind} > {folder}/schema.json"
    )


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_recipes_begin_with_the_line_that_editors_understand(file: Path) -> None:
    assert file.read_text(encoding="utf-8").startswith(f"{LINE}\n# ")
    schema = json.loads((file.parent / "schema.json").read_text(encoding="utf-8"))
    assert set(yaml.safe_load(file.read_text(encoding="utf-8"))) <= set(schema["properties"])


def test_the_schema_knows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "sweep"]) == 0 and "space" in json.loads(capsys.readouterr().out)["properties"]
    found = json.loads(schema_of("train"))
    optimizer = found["$defs"]["OptimizerSection"]
    assert set(found["properties"]) == set(Recipe.model_fields) and optimizer["additionalProperties"] is False
    assert optimizer["properties"]["name"]["enum"] == ["adamw", "muon", "adamw8bit"]


def test_the_table_of_recipes_is_that_of_the_plan_and_needs_no_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    table = json.loads(recipe_table.TABLE.read_text())
    anew = "python -m chatmill.launcher.jobs.recipe_table writes it anew"
    named = [load_recipe(file.stem) for file in sorted(RECIPES["trainer"].glob("*.yaml"))]
    keys = {recipe_table.key_of(r, shape) for r in named if (shape := recipe_table.usual_shape(r))}
    assert keys == set(table) and len(keys) == len(named), anew
    recipe = load_recipe("tiny")
    shape = recipe_table.usual_shape(recipe)
    assert shape is not None
    assert recipe_table.known_needs(table, recipe, shape) == tuple(recipe_table.traced_needs(recipe, shape)), anew
    monkeypatch.setattr(recipe_table, "traced_needs", lambda recipe, shape: pytest.fail("traced"))
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"demo +135 M +1 x \d", out) and "?" not in out


@pytest.mark.exhaustive
def test_the_whole_table_of_recipes_is_that_of_the_plan() -> None:
    table = json.loads(recipe_table.TABLE.read_text())
    for file in sorted(RECIPES["trainer"].glob("*.yaml")):
        recipe = load_recipe(file.stem)
        shape = recipe_table.usual_shape(recipe)
        assert shape is not None
        assert recipe_table.known_needs(table, recipe, shape) == tuple(recipe_table.traced_needs(recipe, shape)), file.stem


def test_help_lists_every_command_once_by_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    commands = next(a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert sorted(listed) == sorted(commands) and "others" not in lines
    assert len(lines) <= 52 and max(len(line) for line in lines if line.startswith("  ")) <= 128


def test_a_dry_run_of_a_training_fits_a_screen_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "train.steps=7", "--dry-run"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert 10 < len(short) <= 40 and "nothing was started" in short[-1] and any("steps       7," in line for line in short)
    assert list(tmp_path.iterdir()) == []
    asked = list[Any]()
    monkeypatch.setattr(launching, "launch", lambda options: asked.append((options.dry_run, options.full)) or 0)
    assert main(["train", "tiny", "--full"]) == 0 and asked == [(True, True)]


def test_a_data_set_in_place_of_a_checkpoint_is_named_by_plan_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text('{"splits": {}}')
    for command in (["plan"], ["launch", "--dry-run"]):
        assert main([command[0], "tiny", f"model.checkpoint={tmp_path}", *command[1:]]) == 2
        assert f"model.checkpoint: {tmp_path} is a data set, not a checkpoint" in capsys.readouterr().err


def test_bash_completes_commands_options_and_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    typed = ["tr", "data ver", "plan --gp", "train ti", "data build chitchat-"]
    ask = """source ./script
    complete_() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_chatmill; echo "${COMPREPLY[@]}"; }
    """ + "\n".join(f"complete_ chatmill {words}" for words in typed)
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["train"], ["verify"], ["--gpu", "--gpus", "--gpus-per-node"], ["tiny"], ["chitchat-scratch"],
    ]  # fmt: skip


def test_one_dry_run_fits_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["launch", "8b", "--on", "slurm", "--nodes", "2", "--gpus-per-node", "8", "--dry-run"]
    monkeypatch.setattr("chatmill.launcher.jobs.plan.plan_lines", lambda *rest: "plan\n" * 20)
    assert main(words) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 50 and "#SBATCH --nodes=2" in short and "sbatch --parsable" in short and "--full" in short
    assert main([*words, "--full"]) == 0
    assert "sequence_length: 8192" in (full := capsys.readouterr().out) and len(full.splitlines()) > 150


def test_every_command_stands_in_the_help_once() -> None:
    text = build_parser().format_help()
    for name in ("new", "help", "recipes", "schema", "completion"):
        assert len(re.findall(rf"^    {name}\s", text, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "set"], "set is a data set, whose own page is"),
        (["new", "chat.txt", "--assistant", "Bob", "--model", "set"], "no checkpoint there"),
        (["data", "inspect", "run"], "run is a run: expected a data-set folder or raw chats"),
    ],
)
def test_a_folder_of_another_kind_is_named_and_stays_as_it_is(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    Path("set/manifest.json").write_text(json.dumps({"format": 1, "splits": {}}))
    Path("set/report.html").write_text("the data set's own page")
    Path("run/checkpoints/step-00000003").mkdir(parents=True)
    Path("run/checkpoints/step-00000003/manifest.json").write_text("{}")
    Path("chat.txt").write_text("Ann: hi\nBob: hello\nAnn: how are you\nBob: fine\n")
    before = sorted(Path().rglob("*"))
    assert main(words) == 2 and message in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before and Path("set/report.html").read_text() == "the data set's own page"
