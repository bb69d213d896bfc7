"""Chats, a recipe and the files of a build, for the tests that build data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from chatmill.data.recipe import DataRecipe

WORDS = ("tea rain bus song moon cake road film cat book sea train star game milk tree snow lamp chair bread").split()  # noqa: SIM905


def chats(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """OpenAI messages; every tenth is an exact duplicate of an earlier one, every eleventh has no reply."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for i in range(n):
        if i % 10 == 9:
            records.append(records[i // 2])
            continue
        turns = 1 if i % 11 == 10 else 2 * int(rng.integers(1, 5))
        messages = [
            {"role": ("user", "assistant")[k % 2], "content": f"{' '.join(rng.choice(WORDS, 6))} {i}"} for k in range(turns)
        ]
        records.append({"messages": messages})
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def recipe(path: Path, **over: Any) -> DataRecipe:
    base: dict[str, Any] = {
        "name": "small",
        "sources": [{"path": str(path)}],
        "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.2},
        "shards": {"block_dialogues": 16, "shard_mb": 0.02},
        "workers": 1,
    }
    return DataRecipe.model_validate(base | over)


def tree(folder: Path) -> dict[str, bytes]:
    free = {"timings.json", "seen.json"}
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in free}
