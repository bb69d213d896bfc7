"""Processor time of each stage of a build with the code of several checkouts, in turn, on the same English and Chinese chats.

    git worktree add ../before 163019f
    python -m chatmill.data.bench.checkouts ../before . [--mb 4] [--rounds 3] [--json results.json]

The raw chats are three parts of the mix of raw_mix.py and two parts of invented Chinese dialogues, and the chitchat chats where
that package is installed. One process with one thread builds, so that its processor time is that of one core; the load of a
machine changes it less than it changes the time of day. Of several rounds the smallest figure of each stage counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from chatmill.config import ConfigError

from .raw_mix import write_mix

STAGES = ("import", "clean", "train tokenizer", "tokenize", "shard")
EXTRAS = (
    "我的邮箱是 wang.li@example.com，电话 13812345678",
    "地址：上海市浦东新区世纪大道100号3楼",
    "ＡＢＣ１２３",
    "订单号 2023 0501 88",
    "用 Python 写 hello world 😀",
)
# Runs in a process of its own with the code of one checkout. Modules lie where version 0.1 has them, or where they are now.
BUILD = """
import importlib, json, sys, time
source, raw, out, chitchat = sys.argv[1:]
sys.path.insert(0, source)
try:
    pipeline = importlib.import_module("chatmill.data.pipeline.pipeline")
except ModuleNotFoundError:
    pipeline = importlib.import_module("chatmill.data.pipeline")
class Clock:
    perf_counter, time = staticmethod(time.process_time), staticmethod(time.time)
pipeline.time = Clock
recipe = importlib.import_module("chatmill.data.recipe").DataRecipe.model_validate({
    "name": "bench",
    "sources": [{"path": raw}, *([{"format": "chitchat"}] if chitchat == "1" else [])],
    "tokenizer": {"train": {"vocab_size": 16384}},
    "clean": {"html": True, "privacy": {"mode": "surrogate"}},
    "workers": 1,
})
report = pipeline.build_dataset(recipe, out)
seconds = json.load(open(out + "/timings.json"))
print(json.dumps({"seconds": seconds, "tokens": sum(split["tokens"] for split in report["splits"].values())}))
"""


def write_chinese(path: Path, megabytes: float) -> None:
    """JSON lines of invented Chinese dialogues: words of common characters, some of them frequent. The same bytes each time."""
    draw, rng = random.Random(5), np.random.default_rng(5)
    common = [bytes([a, b]).decode("gb2312") for a in range(0xB0, 0xD8) for b in range(0xA1, 0xFF) if a < 0xD7 or b < 0xFA]
    draw.shuffle(common)
    words = sorted({"".join(draw.choices(common[:2500], k=draw.choice((1, 2, 2, 2, 3)))) for _ in range(30_000)})
    draw.shuffle(words)
    chances = 1 / (10 + np.arange(len(words)))
    rows = rng.choice(len(words), size=(20_000, 14), p=chances / chances.sum()).tolist()
    sentences = []
    for row, length in zip(rows, rng.integers(4, 15, 20_000).tolist(), strict=True):
        half = length // 2 if length > 7 else length
        text = "".join(words[w] for w in row[:half])
        text += "，" + "".join(words[w] for w in row[half:length]) if half < length else ""
        sentences.append(text + draw.choice("。。。？！"))
    left = megabytes * (1 << 20)
    with path.open("wb") as file:
        while left > 0:
            texts = ["".join(draw.choices(sentences, k=draw.randint(1, 6))) for _ in range(draw.choice((2, 2, 4, 6, 8)))]
            if draw.random() < 0.1:
                texts[-1] += "\n" + draw.choice(EXTRAS)
            messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
            left -= file.write((json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode())


def build(checkout: Path, raw: Path, out: Path, chitchat: bool) -> dict[str, Any]:
    """{"seconds": {stage: processor time}, "tokens": n} of one build with the code of a checkout."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", BUILD, str(checkout.resolve() / "src"), str(raw), str(out), str(int(chitchat))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{checkout}: its build failed.\n{done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results for people; the last column compares the last checkout with the first."""
    names = list(results)
    rows = [
        f"{'tokens/s per core':<18}" + "".join(f"{Path(name).name or name:>14}" for name in names) + f"{'last / first':>14}"
    ]
    for stage in STAGES:
        rates = [results[name]["tokens"] / max(results[name]["seconds"].get(stage, 0.0), 1e-9) for name in names]
        rows.append(f"{stage:<18}" + "".join(f"{rate:>14,.0f}" for rate in rates) + f"{rates[-1] / rates[0]:>14.2f}")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path, help="folders with src/chatmill, the state before first")
    parser.add_argument("--mb", type=float, default=4, help="MiB of invented raw text (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="builds of each (default 3)")
    parser.add_argument("--no-chitchat", action="store_true", help="leave out the chitchat chats")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    chitchat = not options.no_chitchat and importlib.util.find_spec("chitchat_dataset") is not None
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="chatmill-") as name:
        raw = write_mix(Path(name) / "raw", 0.6 * options.mb)
        write_chinese(raw / "zh.jsonl", 0.4 * options.mb)
        for number in range(options.rounds):
            for k, checkout in enumerate(options.checkouts):
                found = build(checkout, raw, Path(name) / f"set-{k}-{number}", chitchat)
                best = results.setdefault(str(checkout), found)
                best["seconds"] = {stage: min(s, best["seconds"][stage]) for stage, s in found["seconds"].items()}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
