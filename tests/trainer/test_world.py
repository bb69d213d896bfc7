"""Launches that disagree with the recipe are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatmill.config import ConfigError
from chatmill.trainer.config import Recipe
from chatmill.trainer.world import check_launch, requested_processes


def recipe(strategy: str = "single", precision: str = "fp32") -> Recipe:
    return Recipe.model_validate({"parallel": {"strategy": strategy}, "train": {"precision": precision}})


def test_a_plain_start_and_matching_launches_are_accepted() -> None:
    check_launch(recipe(), {})
    check_launch(recipe("ddp"), {"RANK": "1", "WORLD_SIZE": "2"})
    check_launch(recipe("fsdp2"), {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"})
    check_launch(recipe(precision="bf16"), {"ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize(
    ("strategy", "environment", "message"),
    [
        ("single", {"RANK": "0", "WORLD_SIZE": "2"}, "would train alone"),
        ("ddp", {}, "started alone"),
        ("ddp", {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "told to use FSDP"),
        ("fsdp2", {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "told to use DEEPSPEED"),
        ("single", {"SLURM_STEP_NUM_TASKS": "4"}, "know nothing of each other"),
        ("single", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16"),
    ],
)
def test_a_silent_downgrade_is_refused_with_the_way_out(strategy: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_launch(recipe(strategy), environment)


def test_accelerates_one_process_launcher_is_recognised(tmp_path: Path) -> None:
    asked = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    none = tmp_path / "none.yaml"
    assert requested_processes(asked, ["accelerate", "launch", "--num_processes", "3", "x.py"], none) == 3
    assert requested_processes(asked, ["accelerate", "launch", "--num_processes=4", "x.py"], none) == 4
    config = tmp_path / "config.yaml"
    config.write_text("num_processes: 2\n")
    assert requested_processes(asked, ["accelerate", "launch", "--config_file", str(config), "x.py"], none) == 2
    assert requested_processes({"ACCELERATE_MIXED_PRECISION": "no"}, [], none) is None
    assert requested_processes(asked | {"RANK": "0"}, [], none) is None
    with pytest.raises(ConfigError, match="cannot be told"):
        requested_processes(asked, ["accelerate"], none)
