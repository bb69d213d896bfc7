"""Preference pairs from raw files to packed segments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatmill.config import ConfigError
from chatmill.data.check.verify import verify_dataset
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.importers.registry import read_file, recognise
from chatmill.data.ledger import Ledger
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.preference import joint
from chatmill.data.raw.files import RawFile
from chatmill.data.recipe import DataRecipe, SourceSection
from chatmill.data.samples.dedup import text_hash
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.stream import PackedStream
from chatmill.data.tokenizer.tokenizer import ChatTokenizer


def imported(path: Path, format: str = "auto") -> tuple[list[Conversation], Ledger]:
    ledger = Ledger("conversations")
    source = SourceSection(format=format, path=str(path))
    if format == "auto":
        assert recognise(RawFile(path)) == "preference"
    return list(read_file(RawFile(path), source, ledger)), ledger


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_every_way_to_write_a_pair_gives_the_same_pair(tmp_path: Path) -> None:
    ask = [message("user", "Why?")]
    ways: list[dict[str, Any]] = [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": ask, "chosen": [message("assistant", "Because.")], "rejected": [message("assistant", "No.")]},
        {"chosen": [*ask, message("assistant", "Because.")], "rejected": [*ask, message("assistant", "No.")]},
        {"prompt": "Why?", "chosen": [*ask, message("assistant", "Because.")], "rejected": [*ask, message("assistant", "No.")]},
    ]
    for n, record in enumerate(ways):
        found, ledger = imported(jsonl(tmp_path / f"{n}.jsonl", [record]))
        assert [(t.role, t.content) for t in found[0].turns] == [("user", "Why?"), ("assistant", "Because.")], record
        assert found[0].meta["rejected"] == "No." and ledger.kept == 1


def test_of_rated_replies_the_best_stands_against_the_worst(tmp_path: Path) -> None:
    replies = [{"text": "fair", "rating": 3}, {"text": "good", "rating": 4.5}, {"text": "bad", "rating": 1}]
    flat = [{"text": "one", "rating": 3}, {"text": "two", "rating": 3}]
    records = [{"prompt": "Which?", "responses": replies}, {"prompt": "Which?", "responses": flat}]
    found, ledger = imported(jsonl(tmp_path / "rated.jsonl", records))
    assert [(c.turns[-1].content, c.meta["rejected"]) for c in found] == [("good", "bad")]
    assert ledger.dropped["bad preference record"] == 1


def test_replies_to_different_questions_are_no_pair(tmp_path: Path) -> None:
    record = {
        "chosen": [message("user", "Why?"), message("assistant", "Because.")],
        "rejected": [message("user", "How?"), message("assistant", "So.")],
    }
    found, ledger = imported(jsonl(tmp_path / "x.jsonl", [record]))
    assert not found and ledger.dropped["bad preference record"] == 1


def node(name: str, role: str, rank: int | None = None, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"message_id": name, "text": f"text {name}", "role": role, "rank": rank, "replies": list(replies), **more}


def test_ranked_replies_of_a_tree_give_best_against_worst_at_every_level(tmp_path: Path) -> None:
    deeper = node("q2", "prompter", None, node("c", "assistant", 1), node("d", "assistant", 0))
    tree = node(
        "q", "prompter", None,
        node("a", "assistant", 0, deeper), node("b", "assistant", 2), node("x", "assistant", 1),
        node("gone", "assistant", 3, deleted=True), node("unranked", "assistant"),
    )  # fmt: skip
    path = jsonl(tmp_path / "x.trees.jsonl", [{"message_tree_id": "t", "prompt": tree}])
    found, _ = imported(path, "oasst_ranks")
    pairs = {(c.turns[-1].content, c.meta["rejected"], len(c.turns)) for c in found}
    assert pairs == {("text a", "text b", 2), ("text d", "text c", 4)}
    assert {c.meta["thread"] for c in found} == {"t"}
    assert recognise(RawFile(path)) == "oasst"  # the same file is dialogues unless ranks are asked for


def test_the_hash_of_a_pair_knows_its_rejected_reply() -> None:
    turns = (Turn("user", "Why?"), Turn("assistant", "Because."))
    one, two, plain = (Conversation("u", turns, "s", "o", meta) for meta in ({"rejected": "A"}, {"rejected": "B"}, {}))
    assert len({text_hash(c) for c in (one, two, plain)}) == 3


def records(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question number {n}?", "chosen": f"A long and helpful answer {n}.", "rejected": "no " * (1 + n % 5)}
        for n in range(count)
    ]


def recipe(path: Path, **changes: Any) -> DataRecipe:
    base: dict[str, Any] = {
        "name": "pairs",
        "sources": [{"path": str(path)}],
        "pair": {"mode": "preference"},
        "split": {"validation": 0.2},
        "tokenizer": {"train": {"vocab_size": 300}},
        "shards": {"block_dialogues": 8},
        "workers": 1,
    }
    return DataRecipe.model_validate(base | changes)


def test_a_built_set_streams_both_halves_as_segments_of_one_pack(tmp_path: Path) -> None:
    raw = records(60)
    path = jsonl(tmp_path / "pairs.jsonl", [*raw, {**raw[0], "rejected": raw[0]["chosen"]}])
    report = build_dataset(recipe(path), tmp_path / "set")
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["clean"]["dropped"] == {}
    assert stages["pair"]["dropped"] == {"chosen and rejected are the same": 1}
    assert verify_dataset(tmp_path / "set") == []
    tokenizer = ChatTokenizer.load(tmp_path / "set" / "tokenizer")
    dataset = TokenDataset.open(tmp_path / "set", "train")
    stream = PackedStream(dataset, sequence_length=512, micro_batch=2, overlong="drop", epochs=1)
    seen = {}
    for batch in stream:
        starts = batch.cu_seqlens.tolist()
        assert batch.pairs is not None and batch.examples == len(batch.pairs) == len(batch.uids)
        for chosen, rejected in batch.pairs.tolist():
            halves = []
            for segment in (chosen, rejected):
                span = slice(starts[segment], starts[segment + 1])
                assert batch.positions[span].tolist() == list(range(starts[segment + 1] - starts[segment]))
                supervised = [int(t) for t in batch.targets[span] if t >= 0]
                prompt = tokenizer.decode(batch.tokens[span].tolist()).split("Question number ")[1].split("?")[0]
                halves.append((prompt, tokenizer.decode(supervised)))
            assert halves[0][0] == halves[1][0]
            seen[int(halves[0][0])] = (halves[0][1], halves[1][1])
    assert len(seen) == len(dataset)
    for n, (chosen, rejected) in seen.items():
        assert chosen == raw[n]["chosen"] + "<|im_end|>"
        assert rejected == raw[n]["rejected"].strip() + "<|im_end|>"


def test_the_same_file_built_as_dialogues_keeps_the_chosen_replies(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", records(40))
    build_dataset(recipe(path, pair={"mode": "dialogues"}), tmp_path / "set")
    dataset = TokenDataset.open(tmp_path / "set", "train")
    tokenizer = ChatTokenizer.load(tmp_path / "set" / "tokenizer")
    text = tokenizer.decode(dataset.read_block(0).ids.tolist())
    assert not dataset.preference and "helpful" in text and "no no" not in text


def test_a_reply_that_cleaning_drops_takes_its_pair_along(tmp_path: Path) -> None:
    raw = [*records(40), {"prompt": "Question 99?", "chosen": "An answer.", "rejected": "[deleted]"}]
    report = build_dataset(recipe(jsonl(tmp_path / "pairs.jsonl", raw)), tmp_path / "set", until="clean")
    dropped = report["stages"][-1]["dropped"]
    assert sum(dropped.values()) == 1 and next(iter(dropped)).startswith("rejected reply")


def test_pairs_and_dialogues_do_not_mix_and_pairs_are_not_cut(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", records(40))
    build_dataset(recipe(path), tmp_path / "set")
    dataset = TokenDataset.open(tmp_path / "set", "train")
    with pytest.raises(ConfigError, match="half a preference pair"):
        PackedStream(dataset, sequence_length=256)


def test_the_joint_follows_from_the_mask_alone() -> None:
    mask = np.zeros(20, bool)
    mask[4:7] = mask[14:19] = True  # contexts of 4 tokens; the first half is 10 tokens long
    assert joint(mask) == 10
    for wrong in (np.zeros(5, bool), np.r_[mask, True, False, True][1:]):
        with pytest.raises(ConfigError, match="two supervised replies"):
            joint(wrong)
