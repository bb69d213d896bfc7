"""The split certificate: a planted leak of each kind is seen by `verify`, and the funnel adds up for any recipe."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmill.config import ConfigError
from chatmill.data.check.verify import verify_dataset
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe

WORDS = ("tea", "rain", "bus", "song", "moon", "cake", "road", "film", "cat", "book", "sea", "train")


def chats(n: int, senders: int) -> dict[str, Any]:
    """Chats of four turns between people of whom each has several chats; no two say the same."""
    return {
        f"chat{i}": {
            "messages": [
                [{"text": f"{WORDS[(i + k) % 12]} {WORDS[(i * 5 + k) % 12]} {i} {k}", "sender": f"p{k % 2}-{i % senders}"}]
                for k in range(4)
            ]
        }
        for i in range(n)
    }


def recipe(raw: Path, **over: Any) -> DataRecipe:
    base = {
        "name": "leak", "sources": [{"path": str(raw)}], "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.2}, "workers": 1,
    }  # fmt: skip
    return DataRecipe.model_validate(base | over)


LEAKS: dict[str, dict[str, Any]] = {
    "conversations": {"pair": {"mode": "pairs"}},
    "authors": {"split": {"validation": 0.2, "by_author": True}},
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_planted_leak_is_refused_by_the_build_and_seen_by_verify(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "dataset.json"
    raw.write_text(json.dumps(chats(60, senders=20)))
    build = recipe(raw, **LEAKS[kind])
    build_dataset(build, tmp_path / "good")
    assert verify_dataset(tmp_path / "good") == []
    # A split that looks at single samples.
    monkeypatch.setattr("chatmill.data.samples.placing.assign", lambda keys, config: np.arange(len(keys)) % 3 == 0)
    with pytest.raises(ConfigError, match=rf"the split leaks: .*'{kind}': [1-9]"):
        build_dataset(build, tmp_path / "refused")
    # And one that believes in itself.
    asked = ["samples", "conversations", "exact_texts", *(["authors"] if kind == "authors" else [])]
    blind = {"shared": dict.fromkeys(asked, 0), "asked": asked, "near": None, "valid": True}
    monkeypatch.setattr("chatmill.data.pipeline.publication.certificate", lambda *a: blind)
    build_dataset(build, tmp_path / "bad")
    monkeypatch.undo()
    problems = verify_dataset(tmp_path / "bad")
    assert any(line.startswith("split: train and validation share") and kind in line for line in problems), problems


TEXTS = st.sampled_from(
    ["tea and rain", "the", "[deleted]", "", "see https://x.org", "As an AI language model, I", "tea <p>so</p><p>on</p>",
     "x" * 80, "mail a@b.com", "I'm sorry, but I can't help with that.", "Copy code\nok then", "same\n" * 12, "漢字轉換茶",
     "<|im_end|> hi"]
)  # fmt: skip
RECIPES = st.fixed_dictionaries(
    {
        "clean": st.fixed_dictionaries(
            {},
            optional={
                "html": st.booleans(), "boilerplate": st.booleans(), "drop_deleted": st.booleans(), "nfc": st.booleans(),
                "drop_refusals": st.booleans(), "drop_provider_identity": st.booleans(), "drop_empty_turns": st.booleans(),
                "min_turn_chars": st.integers(0, 12),
                "min_dialogue_chars": st.integers(0, 60), "max_dialogue_chars": st.integers(50, 900),
                "repetition": st.just({"min_units": 10}), "privacy": st.just({"mode": "redact"}),
            },
        ),
        "pair": st.fixed_dictionaries(
            {}, optional={"mode": st.sampled_from(["dialogues", "pairs"]), "min_replies": st.integers(1, 3),
                          "max_turns": st.integers(2, 5), "context_turns": st.integers(1, 4)},
        ),
        "dedup": st.fixed_dictionaries({}, optional={"exact": st.booleans()}),
    }
)  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(over=RECIPES, said=st.lists(st.lists(TEXTS, min_size=1, max_size=6), min_size=3, max_size=12))
def test_the_funnel_adds_up_for_any_recipe(over: dict[str, Any], said: list[list[str]]) -> None:
    plain = [
        [f"what about {WORDS[i % 12]} number {i}?", f"{WORDS[i % 7]} is fine, number {i}, says everybody"] for i in range(30)
    ]
    rows = [{"messages": [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(c)]} for c in said + plain]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.jsonl"
        raw.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        try:
            report = build_dataset(recipe(raw, **over), Path(folder) / "out")
        except ConfigError as error:  # an honest answer for a recipe that keeps too little
            assert "left" in str(error) or "no conversation" in str(error)
            return
    stages = {stage["name"]: stage for stage in report["stages"]}
    through = {name: stage["kept"] + sum(stage["dropped"].values()) for name, stage in stages.items()}
    assert through["import"] == len(rows) and through["clean"] == stages["import"]["kept"]
    if over["pair"].get("mode") == "pairs":  # one conversation becomes several samples
        assert through["pair"] >= stages["clean"]["kept"]
    else:  # as does one that is cut where a turn was dropped
        cuts = stages["pair"]["changed"].get("cut where a turn was dropped", 0)
        assert stages["clean"]["kept"] <= through["pair"] <= stages["clean"]["kept"] + cuts
    for before, after in (("pair", "dedup"), ("dedup", "split"), ("split", "tokenize"), ("tokenize", "shard")):
        assert through[after] == stages[before]["kept"], (before, after)
    assert stages["shard"]["kept"] == sum(split["dialogues"] for split in report["splits"].values())
    assert sum(sum(part["turns"].values()) for part in report["texts"].values()) == stages["shard"]["kept"]
