"""The demo's commands agree with the recipes that they start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from chatmill.data.recipe import load_data_recipe
from chatmill.launcher.demo import demo
from chatmill.launcher.demo.__main__ import main
from chatmill.trainer.config import load_recipe
from chatmill.trainer.distributed.accelerate import check_accelerate


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("words", [[], ["train.precision=fp32"]])
@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_accelerate_is_told_what_the_recipe_says(gpus: int, bf16: bool, words: list[str]) -> None:
    commands = [list(step.command) for step in demo.real_chats(words, gpus, bf16)]
    launch = next(command for command in commands if "launch" in command)
    at = next(i for i, word in enumerate(launch) if word.endswith("train.py"))
    assert Path(launch[at]).is_file()
    recipe = load_recipe(launch[at + 1], launch[at + 2 :])
    flags = dict(pairwise(launch[:at]))
    environment = {
        "ACCELERATE_MIXED_PRECISION": flags["--mixed_precision"], "ACCELERATE_DYNAMO_BACKEND": flags["--dynamo_backend"],
    }  # fmt: skip
    check_accelerate(recipe, environment, frozenset({"mixed_precision", "dynamo_backend"}))
    assert recipe.parallel.strategy == ("ddp" if gpus > 1 else "single")
    assert flags["--num_processes"] == str(max(1, gpus))
    assert recipe.checkpoint.every_steps < recipe.train.steps  # a demo that is killed has saved


@pytest.mark.parametrize("name", ["Millie", "小米"])
def test_the_personas_commands_fit_their_recipes(name: str) -> None:
    persona = demo.Persona(name)
    build, train, before, after = (list(step.command)[3:] for step in persona.steps(is_slow=True))
    data, recipe = load_data_recipe("persona", build[3:]), load_recipe("persona", train[2:])
    assert (data.name, data.place, data.sources[0].path) == (persona.folder, str(persona.data), str(persona.raw))
    assert (recipe.run_dir, recipe.data.path, recipe.train.precision) == (persona.run, str(persona.data), "fp32")
    assert data.tokenizer.path == recipe.model.checkpoint == before[1] == str(demo.MODEL)
    assert recipe.checkpoint.every_steps < recipe.train.steps
    assert after[1] == str(persona.run) and before[2:-1] == after[2:-1] and before[-1] != after[-1]


def test_steps_are_skipped_once_their_results_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    persona = demo.Persona("小米")
    persona.write()
    written = persona.raw.stat().st_mtime_ns
    persona.write()
    assert persona.raw.stat().st_mtime_ns == written  # else the data set would be built again
    assert not persona.has_before() and not persona.has_after() and not demo.measured()
    checkpoint = persona.run / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    for when in ("before", "after"):
        rows = [json.dumps({"prompt": question.text, "reply": ""}) for question in persona.questions]
        persona.replies(when).write_text("\n".join(rows))
        os.utime(persona.replies(when), (2e9, 2e9))
    assert persona.has_before() and persona.has_after()
    os.utime(checkpoint, (3e9, 3e9))  # trained on since
    assert persona.has_before() and not persona.has_after()
    demo.FIGURES.parent.mkdir(parents=True)
    demo.FIGURES.write_text('{"against": {}}')
    assert not demo.measured()  # of no checkpoint
    demo.RUN.joinpath("checkpoints").symlink_to(checkpoint.parent.resolve())
    assert not demo.measured()  # older than the checkpoint
    os.utime(demo.FIGURES, (4e9, 4e9))
    assert demo.measured()


def test_a_failed_step_ends_the_demo_with_its_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "imported", lambda: True)
    monkeypatch.setattr(demo, "run_step", lambda command: 3 * ("train" in command))
    assert demo.demo("Millie", only="persona") == 3
    assert main(["--name", ""]) == 2


# A step that is interrupted goes on to save for a while, as a training does; the demo's own process group gets the Ctrl-C.
STEP = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
try:
    print("begun", flush=True)  # inside, for the signal may come while this is written
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(1.5)
    Path(sys.argv[1]).write_text("saved")
"""
DEMO = """
import signal, sys
from chatmill.launcher.demo.demo import run_step
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    run_step([sys.executable, "-c", *sys.argv[1:]])
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_lets_the_step_save_before_the_demo_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEMO, STEP, str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, cwd=tmp_path, env=environment) as process:
        assert process.stdout and process.stdout.readline() == b"begun\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
    assert (tmp_path / "file").read_text() == "saved"
