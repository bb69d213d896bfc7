"""The demo's commands agree with the recipes that they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from chatmill.launcher import demo
from chatmill.trainer.config import load_recipe
from chatmill.trainer.distributed.accelerate import check_accelerate


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("words", [[], ["train.precision=fp32"]])
@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_accelerate_is_told_what_the_recipe_says(gpus: int, bf16: bool, words: list[str], monkeypatch: Any) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(demo, "run_step", run)
    monkeypatch.setattr(demo, "count_gpus", lambda: gpus)
    monkeypatch.setattr(demo, "cpu_has_bf16", lambda: bf16)
    monkeypatch.setattr(demo, "print_result", lambda seconds: None)
    assert demo.main(list(words)) == 0
    launch = next(command for command in commands if "launch" in command)
    at = next(i for i, word in enumerate(launch) if word.endswith("train.py"))
    recipe = load_recipe(launch[at + 1], launch[at + 2 :])
    flags = dict(pairwise(launch[:at]))
    environment = {
        "ACCELERATE_MIXED_PRECISION": flags["--mixed_precision"], "ACCELERATE_DYNAMO_BACKEND": flags["--dynamo_backend"],
    }  # fmt: skip
    check_accelerate(recipe, environment, frozenset({"mixed_precision", "dynamo_backend"}))
    assert recipe.parallel.strategy == ("ddp" if gpus > 1 else "single")
    assert flags["--num_processes"] == str(max(1, gpus))


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
from chatmill.launcher.demo import run_step
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    run_step([sys.executable, "-c", *sys.argv[1:]])
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_lets_the_step_save_before_the_demo_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEMO, STEP, str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, cwd=tmp_path, env=environment) as process:
        assert process.stdout and process.stdout.readline() == b"begun\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
    assert (tmp_path / "file").read_text() == "saved"
