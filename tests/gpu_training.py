"""A short real training on a GPU: throughput, MFU and memory of the trainer with its kernels, as JSON.

    python tests/gpu_training.py --out result.json [--recipe smollm2-135m] [--steps 20] [train.compile=true ...]
    torchrun --standalone --nproc-per-node 1 tests/gpu_training.py --out result.json parallel.strategy=fsdp2

The text is generated, so no data set has to be copied to the machine; shards, stream, kernels and loop are the real ones.
The result is written as soon as the last step is done; the checkpoint (15 GB for the 1b) is written only with --save. On a GPU
the initial weights are drawn there: on the CPU that would take as long as the steps (8 billion: over a minute, and 32 GB).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.run_files import read_jsonl
from chatmill.trainer.config import load_recipe
from chatmill.trainer.loop.checkpoints import RunCheckpoints
from chatmill.trainer.loop.loop import train
from chatmill.trainer.model.decoder import Decoder

WARMUP_STEPS = 5
OVERRIDES = (
    "run.name=gpu",
    "parallel.strategy=single",
    "train.accumulation=1",
    "checkpoint.every_steps=1000000",
    "model.checkpoint=null",
    "evaluation.every_steps=0",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "logging.every_steps=1",
    "logging.trackers=[]",
)


def main() -> int:
    """Train one recipe for some steps; write what it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("training.json"))
    parser.add_argument("--recipe", default="smollm2-135m", help="a shipped recipe")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", type=Path, help="folder of the training data; built there if it does not exist")
    parser.add_argument("--only-data", action="store_true", help="build the data and stop")
    parser.add_argument("--save", action="store_true", help="write the last checkpoint")
    parser.add_argument("--profile", type=Path, help="where to put the profile of logging.profile_steps")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "data"
        if not (data / "manifest.json").exists():
            make_data(data)
        if options.only_data:
            return 0
        words = [f"data.path={data}", f"run.dir={folder}/runs", f"train.steps={options.steps}", *OVERRIDES, *options.overrides]
        recipe = load_recipe(options.recipe, words)
        if not options.save:
            RunCheckpoints.save_last = stop_here  # type: ignore[assignment, method-assign]
        if torch.cuda.is_available():
            Decoder.init_weights = draw_on_gpu  # type: ignore[method-assign]
        with contextlib.suppress(EnoughError):
            train(recipe)
        if int(os.environ.get("RANK", "0")):
            return 0
        result = summarise(options.recipe, recipe.model_dump(mode="json"), recipe.run_dir)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1), flush=True)
        if options.profile and (recipe.run_dir / "profile").exists():
            shutil.copytree(recipe.run_dir / "profile", options.profile, dirs_exist_ok=True)
    return 0


class EnoughError(Exception):
    """The steps are done, and no checkpoint is wanted."""


def stop_here(*_: object) -> None:
    """In place of the last checkpoint."""
    raise EnoughError


@torch.no_grad()
def draw_on_gpu(model: Decoder, seed: int) -> None:
    """In place of Decoder.init_weights: parameters with the same spread, created on their device."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        if name.endswith("norm.weight"):
            values.fill_(1.0)
        elif name.endswith(".bias"):
            values.zero_()
        else:
            values.normal_(0.0, model.config.initializer_range, generator=generator)
        parameter.data = values


def make_data(folder: Path) -> None:
    """Chats of random words, mean length about 500 tokens, through the real pipeline."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    raw = folder.with_name(folder.name + ".jsonl")
    raw.parent.mkdir(parents=True, exist_ok=True)
    with raw.open("w", encoding="utf-8") as handle:
        for _ in range(6000):
            messages = []
            for _ in range(rng.randint(1, 6)):
                messages.append({"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(5, 60)))})
                messages.append({"role": "assistant", "content": " ".join(rng.choices(words, k=rng.randint(5, 80)))})
            handle.write(json.dumps({"messages": messages}) + "\n")
    recipe = {
        "name": "words",
        "out": str(folder),
        "sources": [{"format": "openai", "path": str(raw)}],
        "tokenizer": {"train": {"vocab_size": 8192}},
    }
    build_dataset(DataRecipe.model_validate(recipe))


def summarise(name: str, recipe: dict[str, Any], run: Path) -> dict[str, Any]:
    """Medians after the warm-up steps."""
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    steady = lines[WARMUP_STEPS:] or lines
    median = {
        key: statistics.median(line[key] for line in steady)
        for key in ("tokens_per_s", "mfu", "required_mfu", "data_wait_share")
        if key in steady[0]
    }
    environment = json.loads((run / "environment.json").read_text())
    return {
        "recipe": name,
        "median": median,
        "first_steps_s": [round(line["tokens"] / line["tokens_per_s"], 3) for line in lines[:WARMUP_STEPS]],
        "memory_peak_bytes": max(line.get("memory_peak_bytes", 0) for line in lines),
        "losses": [round(line["loss"], 4) for line in lines],
        "sequence_length": recipe["data"]["sequence_length"],
        "micro_batch": recipe["train"]["micro_batch"],
        "strategy": recipe["parallel"]["strategy"],
        "compile": recipe["train"]["compile"],
        "activation_checkpointing": recipe["train"]["activation_checkpointing"],
        "attention": recipe["kernels"]["attention"],
        "parameters": environment["parameters"]["total"],
        "device": environment["device"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
