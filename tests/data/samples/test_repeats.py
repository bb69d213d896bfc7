"""A validation split whose replies are trained on is called so: by the build, its pages, a training and an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.data.report.funnel import print_funnel
from chatmill.data.samples.repeats import in_words
from chatmill.data.shards.dataset import TokenDataset

NOUNS = ("tea", "rain", "buses", "songs", "moons", "cakes", "roads", "films", "cats", "books", "seas", "trains")


def build(folder: Path, canned: bool) -> Path:
    """60 chats of two questions; the replies are three canned ones, or all different."""
    rows = []
    for i in range(60):
        turns = []
        for k in range(2):
            reply = ("You are welcome!", "Please wait.", "Goodbye.")[(i + k) % 3] if canned else f"Number {i} and {k}."
            turns += [{"role": "user", "content": f"What about {NOUNS[i % 12]}, {NOUNS[(i * 5 + k) % 12]} {i} {k}?"}]
            turns += [{"role": "assistant", "content": reply}]
        rows.append(json.dumps({"messages": turns}))
    (folder / "chats.jsonl").write_text("\n".join(rows))
    fields = {
        "name": "r", "sources": [{"path": str(folder / "chats.jsonl")}], "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.2}, "workers": 1,
    }  # fmt: skip
    report = build_dataset(DataRecipe.model_validate(fields), folder / "set")
    print_funnel(report)
    return folder / "set"


def test_canned_replies_are_named_where_a_split_alone_sees_no_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build(tmp_path, canned=True)
    told = " ".join(capsys.readouterr().out.split())
    assert "split certificate: valid" in told
    assert "validation repeats training texts" in told and "(100% of the tokens with loss)" in told
    manifest = json.loads((folder / "manifest.json").read_text())
    dataset = TokenDataset.open(folder, "validation")
    replies, tokens = 2 * len(dataset.lengths), int(dataset.loss_tokens.sum())
    assert manifest["repeats"] == {
        "replies": replies, "repeated": replies, "loss_tokens": tokens, "repeated_tokens": tokens,
    }  # fmt: skip
    assert json.loads((folder / "report.json").read_text())["repeats"] == manifest["repeats"]
    assert "repeats training texts" in (folder / "report.html").read_text(encoding="utf-8")


def test_new_replies_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build(tmp_path, canned=False)
    assert "repeats" not in capsys.readouterr().out
    found = json.loads((folder / "manifest.json").read_text())["repeats"]
    assert found["repeated"] == found["repeated_tokens"] == 0 < found["replies"]
    assert "repeats training texts" not in (folder / "report.html").read_text(encoding="utf-8")


def test_a_few_greetings_are_no_repetition() -> None:
    counts = {"replies": 10, "repeated": 5, "loss_tokens": 100, "repeated_tokens": 50}
    assert in_words(counts) is None and in_words(None) is None
    told = in_words(counts | {"repeated_tokens": 51})
    assert told is not None and "5 of 10 replies (51% of the tokens with loss)" in told
