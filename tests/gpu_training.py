"""A short real training on one GPU: throughput, MFU and memory of the trainer with its kernels, as JSON.

    python tests/gpu_training.py --out results [--recipe smollm2-135m] [--steps 30]

The text is generated (no data set travels to the machine): real shards, stream, kernels and loop; only the words are made up.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from chatmill.data.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.run_files import read_jsonl
from chatmill.trainer.config import load_recipe
from chatmill.trainer.loop import train

WARMUP_STEPS = 5


def main() -> int:
    """Train each asked recipe for some steps; write training.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--recipe", action="append", help="shipped recipe, several allowed (default: smollm2-135m and 1b)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for name in options.recipe or ["smollm2-135m", "1b"]:
            words = [f"data.path={data}", f"run.dir={folder}/runs", f"run.name={name}", f"train.steps={options.steps}"]
            words += ["parallel.strategy=single", "train.accumulation=1", "checkpoint.every_steps=1000000"]
            words += [
                "model.checkpoint=null",
                "evaluation.every_steps=0",
                "evaluation.at_start=false",
                "evaluation.max_dialogues=20",
            ]
            words += ["logging.every_steps=1", *options.overrides]
            recipe = load_recipe(name, words)
            train(recipe)
            results.append(summarise(name, recipe.model_dump(mode="json"), recipe.run_dir))
            print(json.dumps(results[-1], indent=2), flush=True)
            (options.out / "training.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


def make_data(folder: Path) -> Path:
    """Chats of random words, mean length about 500 tokens, through the real pipeline."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    raw = folder / "chats.jsonl"
    with raw.open("w", encoding="utf-8") as handle:
        for _ in range(6000):
            messages = []
            for _ in range(rng.randint(1, 6)):
                messages.append({"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(5, 60)))})
                messages.append({"role": "assistant", "content": " ".join(rng.choices(words, k=rng.randint(5, 80)))})
            handle.write(json.dumps({"messages": messages}) + "\n")
    recipe = {
        "name": "words",
        "out": str(folder / "data"),
        "sources": [{"format": "openai", "path": str(raw)}],
        "tokenizer": {"train": {"vocab_size": 8192}},
    }
    build_dataset(DataRecipe.model_validate(recipe))
    return folder / "data"


def summarise(name: str, recipe: dict[str, Any], run: Path) -> dict[str, Any]:
    """Medians after the warm-up steps."""
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line][WARMUP_STEPS:]
    median = {
        key: statistics.median(line[key] for line in lines)
        for key in ("tokens_per_s", "mfu", "data_wait_share")
        if key in lines[0]
    }
    environment = json.loads((run / "environment.json").read_text())
    return {
        "recipe": name,
        "median": median,
        "memory_peak_bytes": max(line.get("memory_peak_bytes", 0) for line in lines),
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "sequence_length": recipe["data"]["sequence_length"],
        "micro_batch": recipe["train"]["micro_batch"],
        "parameters": environment["parameters"]["total"],
        "device": environment["device"],
        "versions": environment["versions"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
