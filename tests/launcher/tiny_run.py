"""A data set and a recipe so small that a training run takes seconds on one core: for tests that launch real runs."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from chatmill.data.conversation import Conversation, Turn
from chatmill.data.shards.manifest import MANIFEST
from chatmill.data.shards.writer import ShardWriter
from chatmill.data.tokenizer.tokenizer import train_bpe

WORDS = ("the", "a", "cat", "dog", "sees", "likes", "chases", "red", "small", "old", "house", "tree", "river", "runs", "sings")

RECIPE = """\
run: {{name: {name}, dir: {runs}}}
data: {{path: {data}, sequence_length: 64}}
model: {{vocab_size: {vocab}, hidden_size: 16, intermediate_size: 32, layers: 1, heads: 2, kv_heads: 1, context: 64}}
optimizer: {{lr: 3.0e-3}}
schedule: {{name: constant}}
train: {{steps: {steps}, micro_batch: 1, precision: fp32, cpu_threads: 1}}
checkpoint: {{every_steps: {every}, keep: 2}}
evaluation: {{at_start: false, at_end: false}}
logging: {{every_steps: 1, trackers: []}}
"""


def make_data(folder: Path, dialogues: int = 200, seed: int = 0) -> int:
    """Write a data-set folder with its tokenizer; returns the vocabulary size."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))

    chats = [
        Conversation(f"d{i:04d}", (Turn("user", sentence()), Turn("assistant", sentence())), "made-up", f"line:{i}", {})
        for i in range(dialogues)
    ]
    tokenizer = train_bpe((turn.content for chat in chats for turn in chat.turns), 300)
    tokenizer.save(folder / "tokenizer")
    splits = {}
    for split, part in (("train", chats[:-20]), ("validation", chats[-20:])):
        writer = ShardWriter(folder, split, vocab_size=tokenizer.vocab_size, block_dialogues=16)
        for chat in part:
            writer.add(tokenizer.encode_dialogue(chat), chat.source, chat.origin)
        splits[split] = {"shards": writer.close()}
    manifest = {"format": 1, "vocab_size": tokenizer.vocab_size, "splits": splits}
    hashes = {"tokenizer_sha256": tokenizer.fingerprint, "template_sha256": tokenizer.fingerprint}
    (folder / MANIFEST).write_text(json.dumps(manifest | hashes))
    return tokenizer.vocab_size


def write_recipe(folder: Path, name: str, data: Path, vocab: int, steps: int = 20, every: int = 5) -> Path:
    """Write folder/NAME.yaml whose run goes to folder/runs/NAME."""
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name, runs=folder / "runs", data=data, vocab=vocab, steps=steps, every=every))
    return path


def wait_until(what: str, done: Callable[[], object], timeout_s: float = 600.0) -> None:
    """Poll until `done()` is true."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)
