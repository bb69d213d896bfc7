"""The code in docs/stream.md runs, from top to bottom."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from chatmill.data.conversation import Conversation, TokenizedDialogue, Turn, dump_line
from chatmill.data.shards.dialogues import DialogueWriter
from chatmill.data.shards.manifest import MANIFEST
from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.shards.writer import ShardWriter
from chatmill.trainer.config import Recipe

PAGE = Path(__file__).parents[3] / "docs" / "stream.md"


def test_every_python_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {}
    for split, count in (("train", 400), ("validation", 100)):
        memory = MemoryDataset.random(count, mean=300, name=split)
        writer = ShardWriter(tmp_path / "corpora/chitchat", split, vocab_size=65_536)
        for uid, ids, mask in zip(memory.uids, memory.ids, memory.masks, strict=True):
            writer.add(TokenizedDialogue(uid, ids.astype(np.uint32), mask), "test", f"{split}.jsonl:{uid}")
        splits[split] = {"shards": writer.close()}
    texts = DialogueWriter(tmp_path / "corpora/chitchat", "train")
    texts.add("one", dump_line(Conversation("one", (Turn("assistant", "hi"),), "test", "train.jsonl:1")).encode())
    texts.close()
    manifest = {"format": 1, "vocab_size": 65_536, "tokenizer_sha256": "a", "template_sha256": "b", "splits": splits}
    (tmp_path / "corpora/chitchat" / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["supervised"] > 0 and 3 in names["steps"]
    assert len(names["block"].uids) > 0 and names["conversation"].uid == "one"
    assert names["state"]["step"] == 3 and names["stream"].options.max_tokens == 10_000_000


def test_the_recipe_of_the_page_is_a_recipe() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.data.paths == {"chat": "corpora/chat", "code": "corpora/code"} and recipe.train.epochs == 2
    assert recipe.data.weights == {0: {"chat": 3, "code": 1}, 1000: {"chat": 1, "code": 1}}
