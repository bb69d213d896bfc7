"""The demo's commands agree with the recipes that they start."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from typing import Any

import pytest

from chatmill.launcher import demo
from chatmill.trainer.accelerate_settings import check_accelerate
from chatmill.trainer.config import load_recipe


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("words", [[], ["train.precision=fp32"]])
@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_accelerate_is_told_what_the_recipe_says(gpus: int, bf16: bool, words: list[str], monkeypatch: Any) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", run)
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
