"""`accelerate launch` with the config files and flags of docs/engines.md, as they are written there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatmill.run_files import read_jsonl
from chatmill.trainer.config import load_recipe
from chatmill.trainer.loop.loop import train

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "engines.md"
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def run_line(start: str, recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the one line of docs/engines.md that starts so, with another recipe than `tiny`."""
    [line] = [text for text in PAGE.read_text(encoding="utf-8").splitlines() if text.startswith(start)]
    words = line.split("#")[0].split()
    at = words.index("tiny")
    words[:1] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    words[at + 2] = str(recipe)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [*words, *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
def test_accelerates_fsdp_config_file_trains_as_one_process(write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("reference", train={"steps": 2, "precision": "bf16"}))))
    recipe = write_recipe("shared", train={"steps": 2, "accumulation": 2, "precision": "bf16"})
    done = run_line("accelerate launch --config_file docs/accelerate/fsdp2.yaml", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "strategy fsdp2 (FSDPDecoder, sharded 20 of 20)" in done.stdout
    assert losses(tmp_path / "runs" / "shared") == pytest.approx(losses(tmp_path / "runs" / "reference"), rel=5e-3)


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed (make .venv/.deepspeed)")
def test_accelerates_zero_flags_train_as_one_process(write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("reference", train={"steps": 2}))))
    recipe = write_recipe("shared", train={"steps": 2, "accumulation": 2})
    done = run_line("accelerate launch --use_deepspeed --zero_stage 3", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "strategy zero3 (DeepSpeedEngine/" in done.stdout
    assert losses(tmp_path / "runs" / "shared") == pytest.approx(losses(tmp_path / "runs" / "reference"), rel=2e-5)
