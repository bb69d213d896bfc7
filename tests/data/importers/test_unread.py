"""Text in a field that no importer reads is counted by the name of the field; what was kept, and what is no text, is not."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chatmill.data.importers import unread
from chatmill.data.importers.registry import read_file, source_files
from chatmill.data.importers.unread import EVERY, LEARNT, METADATA, MOST_FIELDS, MOST_NAMES, Unread, is_prose
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

from .importer_formats import FORMATS, fit_dialogue
from .test_case_files import CASES

LOST = "This remark belongs to the chat and is read by nobody."
OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
TALKS = [
    ["hello there, this is a rather long question about things", "good day, and here is a rather long answer to it"],
    ["今天天气怎么样呢？我想知道今天外面是不是很冷，要不要带伞", "今天天气很好，适合出去散步，不用带伞，祝你玩得开心"],
]
REASONS = ("text in a field that is not used: ", "field of a message not used: ", "field of a dialogue not used: ")


def counted(path: Path, **options: Any) -> dict[str, list[str]]:
    """{field: examples} of what was read by nobody."""
    ledger, section = Ledger(), SourceSection(path=str(path), **options)
    for file in source_files(section):
        for _ in read_file(file, section, ledger):
            pass
    return {key.removeprefix(why): ledger.examples[key] for key in ledger.changed for why in REASONS if key.startswith(why)}


def with_remarks(value: Any, said: set[str]) -> Any:
    """A JSON value whose objects with something said have a remark."""
    if isinstance(value, list):
        return [with_remarks(item, said) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: with_remarks(item, said) for key, item in value.items()}
    texts = [item for part in value.values() for item in (part if isinstance(part, list) else [part]) if isinstance(item, str)]
    is_said = any(text in item for item in texts for text in said)
    return found | {"remark": LOST} if is_said else found


JSON_FORMATS = (
    "openai", "preference", "sharegpt", "alpaca", "oasst", "oasst messages", "telegram", "discord", "slack", "document lines",
    "reddit", "query and response", "messenger", "signal", "wechat weflow", "chatgpt", "claude", "deepseek", "chatmill",
)  # fmt: skip


def planted(name: str, folder: Path) -> str:
    """Render two chats and plant remarks in every JSON file; the format."""
    kind, render, limit = FORMATS[name]
    talks = [fit_dialogue(talk, limit) for talk in TALKS]
    render(folder, talks)
    said, count = {text for talk in talks for text in talk}, 0
    for path in [p for p in folder.rglob("*") if ".json" in p.name or p.suffix == ".bz2"]:
        opened = OPEN.get(path.suffix, open)
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
        try:
            values = [json.loads(text)]
        except ValueError:
            values = [json.loads(line) for line in text.split("\n") if line.strip()]
        changed = [json.dumps(with_remarks(value, said), ensure_ascii=False) for value in values]
        count += LOST in "".join(changed)
        with opened(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(changed))
    assert count, "nothing was planted"
    return kind


@pytest.mark.parametrize("name", JSON_FORMATS)
def test_a_text_in_an_unknown_field_is_counted_with_its_place(name: str, tmp_path: Path) -> None:
    found = counted(tmp_path, format=planted(name, tmp_path))
    assert {field.rpartition(".")[2] for field in found} == {"remark"}, found
    assert all(":" in example for examples in found.values() for example in examples)


def test_no_sample_has_text_that_nobody_reads_but_those_made_for_it(tmp_path: Path) -> None:
    kinds = {FORMATS[name][0] for name in JSON_FORMATS} | {"csv", "stack_exchange", "gemini", "utterances", "oasst_ranks"}
    for k, (kind, render, limit) in enumerate(found for found in FORMATS.values() if found[0] in kinds):
        (tmp_path / str(k)).mkdir()
        path = render(tmp_path / str(k), [fit_dialogue(talk, limit) for talk in TALKS])
        assert not counted(path, format=kind), kind


def test_columns_of_a_table_that_are_not_used_are_counted_and_metadata_is_not(tmp_path: Path) -> None:
    rows = ["prompt,response,notes,source,url", f"how are you today?,fine and you?,{LOST},{LOST},https://a.example/b c d e f"]
    (tmp_path / "x.csv").write_text("\n".join(rows), encoding="utf-8")
    assert list(counted(tmp_path / "x.csv")) == ["notes"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LOST, True),
        ("这是一段没有人读的备注，写在别的字段里，应该被数到才对。", True),
        ("https://example.com/a/b/c/d?x=1&y=2", False),
        ("2026-11-30 19:47:30 +0000 UTC 1", False),
        ('{"city": "somewhere near Berlin", "day": "today"}', False),
        ("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", False),
        ("<div class=body>this is the same once more</div>", False),
        ("short text of four words"[:20], False),
    ],
)
def test_what_counts_as_a_text(text: str, expected: bool) -> None:
    assert is_prose(text) == expected


def test_what_an_importer_cuts_joins_and_cleans_is_not_counted() -> None:
    ledger = Ledger()
    unread = Unread(ledger)
    whole = "Human: what is the largest lake in Germany?\nAssistant: it is Lake Constance, in the south."
    unread.note({"text": whole}, ("what is the largest lake in Germany?", "it is Lake Constance, in the south."), "f:1")
    unread.note(
        {"html": "Q &amp; A are here,\n   and there is more of it"}, ("Q & A are here, and there is more of it",), "f:2"
    )
    unread.note({"chosen": LOST, "rejected": LOST + " No."}, ("hm",), "f:3", ({"a": [LOST, {"b": LOST + " No."}]},))
    turns = [{"said": "this one was on the screen at last"}, {"said": "an earlier form of it, on a branch of the chat"}]
    unread.note({"turns": turns}, ("this one was on the screen at last",), "f:4")  # branches are counted elsewhere
    unread.note(dict.fromkeys(METADATA, LOST), ("hm",), "f:5")
    assert not ledger.changed


def test_the_work_is_bounded_for_records_of_many_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, searches = Ledger(), [0]
    real = unread._stands_in
    monkeypatch.setattr(unread, "_stands_in", lambda *a: (searches.__setitem__(0, searches[0] + 1), real(*a))[1])
    noted = Unread(ledger)
    for number in range(10):
        noted.note({f"field{number}-{k}": f"{LOST} {k}" for k in range(1000)}, ("hm",), f"f:{number}")
    assert searches[0] == 10 * MOST_FIELDS
    assert len(ledger.changed) == MOST_NAMES and ledger.changed["text in a field that is not used: others"]


def test_samples_from_real_programs_have_no_text_that_nobody_reads() -> None:
    for path in sorted(CASES.rglob("*.json*")):
        ledger, section = Ledger(), SourceSection(path=str(path))
        try:
            for file in source_files(section):
                for _ in read_file(file, section, ledger):
                    pass
        except ValueError:  # some are refused
            continue
        assert not [key for key in ledger.changed if key.startswith(REASONS[0])], path


def test_every_text_of_a_field_that_is_never_read_is_counted_and_a_rare_field_is_seen(tmp_path: Path) -> None:
    pair = {"prompt": "how are you today, my friend?", "response": "fine, thank you, and how are you?"}
    lines = [pair | {"remark": f"{LOST} {k}"} if k % 2 else pair for k in range(600)]
    lines[577] = lines[577] | {"rare": LOST}
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    ledger, section = Ledger(), SourceSection(path=str(tmp_path / "x.jsonl"), format="pairs")
    (file,) = source_files(section)
    assert len(list(read_file(file, section, ledger))) == 600
    assert ledger.changed == {f"{REASONS[0]}remark": 300, f"{REASONS[0]}rare": 1}
    assert ledger.examples[f"{REASONS[0]}rare"] == [f"x.jsonl:578: {LOST}"]


@pytest.mark.parametrize("name", [*(name for name in JSON_FORMATS if name != "chatmill"), "stack exchange", "chitchat"])
def test_of_records_whose_fields_are_known_few_are_looked_at(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of the count: looking at every record doubled the time of some imports."""
    kind, render, limit = FORMATS[name]
    path = render(tmp_path, [fit_dialogue([f"{text} {k}" for text in TALKS[0]], limit) for k in range(150)])
    looked, asked = [0], [0]
    note, is_known = Unread.note, Unread.is_known
    monkeypatch.setattr(Unread, "note", lambda *a: (looked.__setitem__(0, looked[0] + 1), note(*a))[1])
    monkeypatch.setattr(Unread, "is_known", lambda *a: (asked.__setitem__(0, asked[0] + 1), is_known(*a))[1])
    section, ledger = SourceSection(path=str(path), format=kind), Ledger()
    for file in source_files(section):
        list(read_file(file, section, ledger))
    assert asked[0] >= 150 and looked[0] <= 2 * LEARNT + 4 + asked[0] // EVERY * 2, (looked, asked)
