"""What a stage made can be written, looked at, edited and read again; raw chats can be looked at before any build."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chatmill.config import ConfigError
from chatmill.data.check.raw_sample import inspect_raw, raw_sources
from chatmill.data.conversation import Conversation, Turn, to_record
from chatmill.data.importers.datasets.written import FIELDS, written_line
from chatmill.data.importers.registry import read_file, recognise, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import SourceSection
from chatmill.launcher.__main__ import main

from ..build_cases import recipe

WHATSAPP = "\n".join(
    f"2023/5/{day} {hour:02d}:00 - {name}: {text}"
    for day in range(1, 9)
    for hour, name, text in (
        (8, "小明", f"早上好，第{day}天了，今天吃什么？"),
        (8, "阿杰", f"去吃第{day}家火锅吧，我请客"),
        (8, "小明", "<省略影音内容>"),
        (8, "小明", f"好的，{day}点见"),
        (8, "阿杰", f"不见不散，带上{day}把伞"),
    )
)


def exports(folder: Path) -> Path:
    """A WhatsApp chat, OpenAI messages with loss turned off, and something that is no chat."""
    raw = folder / "raw"
    raw.mkdir()
    (raw / "wa.txt").write_text(WHATSAPP, encoding="utf-8")
    lines = [
        {"messages": [
            {"role": "system", "content": "be kind"}, {"role": "user", "content": f"question {k}", "name": "ann"},
            {"role": "assistant", "content": f"first answer {k}", "weight": 0}, {"role": "user", "content": f"and {k}?"},
            {"role": "assistant", "content": f"second answer\u2028 {k} 😀", "weight": 1},
        ], "id": f"x{k}"}
        for k in range(20)
    ]  # fmt: skip
    (raw / "openai.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (raw / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x01\x02")
    return raw


def read(path: Path, **options: Any) -> tuple[list[Conversation], Ledger]:
    ledger, section = Ledger(), SourceSection(path=str(path), **options)
    return [c for file in source_files(section) for c in read_file(file, section, ledger)], ledger


@pytest.mark.parametrize("stage", ["import", "clean", "pair"])
def test_what_a_stage_made_is_written_and_read_back_with_nothing_lost(stage: Any, tmp_path: Path) -> None:
    small = recipe(exports(tmp_path), pair={"mode": "pairs"})
    out = tmp_path / "made.jsonl"
    report = build_dataset(small, tmp_path / "set", until=stage, dialogues=out)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    kept = next(s["kept"] for s in report["stages"] if s["name"] == stage)
    assert report["dialogues"] == len(records) == kept > 20 and set(records[0]) == FIELDS
    assert {file for record in records for file in (record["origin"].split(":")[0],)} == {"wa.txt", "openai.jsonl"}
    found, ledger = read(out)
    assert {recognise(file) for file in source_files(SourceSection(path=str(out)))} == {"chatmill"}
    assert [json.loads(written_line(conversation)) for conversation in found] == records
    assert not ledger.dropped and not ledger.changed and ledger.kept == len(found)
    turns = [turn for conversation in found for turn in conversation.turns]
    assert any(turn.time for turn in turns) and any(turn.name == "阿杰" for turn in turns) and not all(t.loss for t in turns)
    assert not (tmp_path / "set").exists()
    # Going on from the file: the same dialogues reach the end of the same stage.
    again = build_dataset(recipe(out, pair=small.pair), tmp_path / "set2", until=stage, dialogues=tmp_path / "again.jsonl")
    texts = [[message["content"] for message in record["messages"]] for record in records]
    second = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [[m["content"] for m in record["messages"]] for record in second] == texts and again["dialogues"] == kept


def test_an_edited_file_says_what_it_cannot_use(tmp_path: Path) -> None:
    whole = Conversation("u1", (Turn("user", "hi", "ann", 5.0), Turn("assistant", "yo")), "s", "raw:1", {"thread": "t"})
    record = to_record(whole)

    def edited(**over: Any) -> dict[str, Any]:
        return json.loads(json.dumps(record)) | over

    lines = [
        record,
        record,  # copied by hand
        edited(uid="u2", messages=[{"role": "user", "content": "new"}, {"role": "assistant", "content": "words", "weight": 0}]),
        edited(uid="u3", note="look again"),
        edited(uid="u4", messages=[{"role": "user", "content": "a", "mood": "sad"}, {"role": "assistant", "content": "b"}]),
        edited(uid="u5", messages=[{"role": "boss", "content": "a"}]),
        edited(uid="u6", messages=[{"role": "user", "content": None}]),
        edited(uid="u7", messages="none"),
        edited(uid="u8", meta=[1]),
        edited(uid="u9", meta={"authors": 3}),
        edited(uid=7),
        edited(uid="u10", messages=[{"role": "user", "content": "a", "loss": "no"}]),
        edited(uid="u11", messages=[3]),
    ]
    path = tmp_path / "edited.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, ledger = read(path)
    assert found[0] == whole and len({c.uid for c in found}) == len(found) == ledger.kept == 5
    assert [turn.loss for turn in found[2].turns] == [True, False] and found[2].origin == "raw:1"
    assert ledger.changed == {
        "uid that another line has: a new one is given": 1, "field of a dialogue not used: note": 1,
        "field of a message not used: mood": 1,
    }  # fmt: skip
    assert ledger.dropped.total() == len(lines) - 5
    assert [c.source for c in read(path, name="mine")[0]] == ["mine"] * 5


def test_a_cut_moves_with_the_message_behind_it(tmp_path: Path) -> None:
    said = ["q1", "a1", "[deleted]", "a2", "q3 is long enough", "a3 is long enough"]
    messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
    (tmp_path / "raw.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    build_dataset(recipe(tmp_path / "raw.jsonl"), tmp_path / "set", until="clean", dialogues=tmp_path / "made.jsonl")
    record = json.loads((tmp_path / "made.jsonl").read_text())
    assert [message.get("cut_before", False) for message in record["messages"]] == [False, False, True, False, False]
    assert read(tmp_path / "made.jsonl")[0][0].meta["cut_before"] == [2]
    del record["messages"][:1]  # by hand
    (tmp_path / "edited.jsonl").write_text(json.dumps(record) + "\n")
    found, ledger = read(tmp_path / "edited.jsonl")
    assert found[0].turns[1].content == "a2" and found[0].meta["cut_before"] == [1] and not ledger.changed


def test_the_file_is_refused_where_it_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = recipe(exports(tmp_path))
    for stage, out, message in (
        ("dedup", tmp_path / "x.jsonl", "makes no dialogues"),
        ("pair", tmp_path / "nowhere" / "x.jsonl", "a folder that exists"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_dataset(small, tmp_path / "set", until=stage, dialogues=out)  # type: ignore[arg-type]
    (tmp_path / "r.yaml").write_text(json.dumps(small.model_dump(mode="json", exclude_none=True)))
    assert main(["data", "split", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "makes no dialogues" in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()


def test_raw_chats_are_shown_before_any_build(tmp_path: Path) -> None:
    raw = exports(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    sources = raw_sources(str(raw))
    assert sources is not None
    page = io.StringIO()
    chosen = inspect_raw(sources, samples=3, seed=1, console=Console(file=page, width=200))
    text = page.getvalue()
    for words in ("wa.txt: whatsapp, 8 dialogues", "openai", "小明 (user) 16", "阿杰 (assistant) 16", "2023-05-01 – 2023-05-08",
                  "28 dialogues", "left out, empty or of no known format: picture.png", "--seed 1"):  # fmt: skip
        assert words in text, words
    assert len({c.uid for c in chosen}) == 3 and all(c.turns[0].content in text for c in chosen)
    assert sorted(tmp_path.rglob("*")) == before
    other = raw_sources(str(raw / "wa.txt"), ["assistant=小明"])
    assert other is not None
    flipped = inspect_raw(other, samples=1, seed=1, console=Console(file=io.StringIO()))
    assert flipped[0].turns[1].name == "阿杰" or flipped[0].turns[0].role == "assistant"


def test_every_dialogue_is_as_likely_to_be_shown(tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": "a"}]} for k in range(10)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources, seen = raw_sources(str(tmp_path / "c.jsonl")), Counter[str]()
    assert sources is not None
    for seed in range(60):
        seen.update(c.turns[0].content for c in inspect_raw(sources, 2, seed, Console(file=io.StringIO())))
    assert len(seen) == 10 and all(3 <= count <= 25 for count in seen.values()), seen


def test_inspect_knows_raw_chats_recipes_and_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = exports(tmp_path)
    assert main(["data", "inspect", str(raw / "wa.txt"), "assistant=小明", "--samples", "1", "--seed", "3"]) == 0
    assert "小明 (assistant)" in capsys.readouterr().out
    small = recipe(raw)
    (tmp_path / "r.yaml").write_text(json.dumps(small.model_dump(mode="json", exclude_none=True)))
    assert main(["data", "inspect", str(tmp_path / "r.yaml")]) == 0
    assert "openai" in capsys.readouterr().out
    assert main(["data", "inspect", str(raw), "--html", "x.html"]) == 2 and "needs a data set" in capsys.readouterr().err
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    assert raw_sources(str(tmp_path / "set")) is None and raw_sources("s3://bucket/sets/x") is None
    assert main(["data", "inspect", str(raw), "asistant=Ann"]) == 2 and "did you mean 'assistant'" in capsys.readouterr().err
