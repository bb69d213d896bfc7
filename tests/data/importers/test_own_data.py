"""What people bring: exports with pictures beside them, files of Windows programs, names that occur twice, broken lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation
from chatmill.data.importers.registry import read_file, recognise, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.pipeline.inputs import raw_files
from chatmill.data.pipeline.stages import ImportFile
from chatmill.data.pipeline.work_folder import WorkFolder
from chatmill.data.raw.encodings import text_encoding
from chatmill.data.recipe import DataRecipe, PairSection, SourceSection
from chatmill.data.samples.pair import make_samples


def chat(text: str) -> str:
    """One line of an OpenAI file."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} back"}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def read(path: Path, **fields: Any) -> tuple[list[Conversation], Ledger]:
    """All conversations of one file."""
    options, ledger = SourceSection(path=str(path), **fields), Ledger("conversations")
    return [c for file in source_files(options) for c in read_file(file, options, ledger)], ledger


def recipe(*paths: Path) -> DataRecipe:
    """A recipe of these sources."""
    sources = [{"path": str(path)} for path in paths]
    return DataRecipe.model_validate({"name": "x", "sources": sources, "tokenizer": {"train": {"vocab_size": 300}}})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_wide_encodings_are_read_as_utf8_is(encoding: str, tmp_path: Path) -> None:
    # Spelt with the byte of a line feed inside of a character (U+010A), and with a character of two halves.
    text = "".join(chat(f"Ċ {n} 😀 你好") for n in range(5_000))
    (tmp_path / "plain.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "wide.jsonl").write_bytes(text.encode(encoding))
    named = {"encoding": encoding, "format": "openai"} if encoding == "utf-16-le" else {}
    found, _ = read(tmp_path / "wide.jsonl", **named)
    assert [c.turns for c in found] == [c.turns for c in read(tmp_path / "plain.jsonl")[0]] and len(found) == 5_000
    (tmp_path / "array.json").write_bytes(("[" + chat("a") + "," + chat("b") + "]").encode(encoding))
    assert len(read(tmp_path / "array.json", **named)[0]) == 2


def test_a_broken_first_line_does_not_hide_the_format(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"messages": [{"role": "us\n' + chat("a") + chat("b"))
    found, ledger = read(tmp_path / "x.jsonl")
    assert len(found) == 2 and ledger.dropped == {"not JSON": 1}


def test_semicolons_of_a_spreadsheet_are_seen(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('"question, asked";answer\na, b;c\n')
    found, _ = read(tmp_path / "x.csv", columns={"prompt": "question, asked", "reply": "answer"})
    assert [[t.content for t in c.turns] for c in found] == [["a, b", "c"]]


def test_pictures_in_a_message_are_counted(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    found, ledger = read(tmp_path / "x.jsonl")
    assert found[0].turns[0].content == "look" and ledger.changed == {"picture, sound or file left out of a message": 1}


def test_a_chatgpt_export_is_the_branch_that_was_on_the_screen(tmp_path: Path) -> None:
    def node(name: str, parent: str | None, role: str, text: str, **content: Any) -> dict[str, Any]:
        body = {"content_type": "text", "parts": [text], **content}
        message = {"author": {"role": role}, "content": body, "create_time": 1.5, "metadata": {}}
        return {"id": name, "parent": parent, "children": [], "message": message}

    nodes = [
        {"id": "root", "parent": None, "children": ["s"], "message": None},
        node("s", "root", "system", ""),
        node("u", "s", "user", "Hi"),
        node("first", "u", "assistant", "Hello"),
        node("second", "u", "assistant", "Good day"),
        node("mull", "second", "assistant", "hm", content_type="thoughts"),
        node(
            "u2",
            "mull",
            "user",
            "What is this?",
            content_type="multimodal_text",
            parts=[{"asset_pointer": "f"}, "What is this?"],
        ),
        node("last", "u2", "assistant", "A cat"),
    ]
    record = {"title": "T", "current_node": "last", "mapping": {n["id"]: n for n in nodes}}
    (tmp_path / "conversations.json").write_text(json.dumps([record, {"title": "empty", "mapping": {}}]))
    found, ledger = read(tmp_path / "conversations.json")
    assert [(t.role, t.content) for t in found[0].turns] == [
        ("user", "Hi"),
        ("assistant", "Good day"),
        ("user", "What is this?"),
        ("assistant", "A cat"),
    ]
    assert ledger.dropped == {"no path to current_node": 1}
    assert ledger.changed == {
        "message of another branch left out": 1,
        "thoughts and settings left out": 1,
        "picture, sound or file left out of a message": 1,
    }


def test_files_of_one_name_have_labels_and_uids_of_their_own(tmp_path: Path) -> None:
    for folder in ("a/2023", "a/2024", "b/2024"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jsonl").write_text(chat(folder))
    (tmp_path / "b/2024/y.jsonl").write_text(chat("y"))
    chosen = recipe(tmp_path / "a", tmp_path / "b")
    files, left_out = raw_files(chosen)
    assert [file.label for _, file in files] == ["2023/x.jsonl", "a/2024/x.jsonl", "b/2024/x.jsonl", "y.jsonl"] and not left_out
    uids = [c.uid for number, file in files for c in read_file(file, chosen.sources[number], Ledger())]
    assert len(set(uids)) == 4


def test_pictures_and_empty_files_of_a_folder_are_left_out_by_name_and_alone_they_are_errors(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(chat("a"))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    files, left_out = raw_files(recipe(tmp_path))
    assert [file.label for _, file in files] == ["chat.jsonl"] and left_out == ["empty.jsonl", "photo.png"]
    (alone,), _ = raw_files(recipe(tmp_path / "photo.png"))
    with pytest.raises(ConfigError, match=r"photo\.png: format not recognised"):
        recognise(alone[1])
    (tmp_path / "chat.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"empty\.jsonl: the file is empty"):
        raw_files(recipe(tmp_path))


def test_turns_that_are_joined_and_turns_that_are_left_out_are_counted_apart(tmp_path: Path) -> None:
    roles = ("assistant", "user", "user", "assistant", "system", "assistant", "user")
    messages = [{"role": role, "content": f"{n}"} for n, role in enumerate(roles)]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    found, _ = read(tmp_path / "x.jsonl")
    ledger = Ledger("samples")
    samples = list(make_samples(found[0], PairSection(), ledger))
    assert [(t.role, t.content) for t in samples[0].turns] == [("user", "1\n2"), ("assistant", "3")], (
        "cut where the system turn is left out"
    )
    assert sorted(ledger.changed.values()) == [1, 1, 4] and ledger.changed["turns of one speaker in a row joined"] == 1
    assert ledger.changed["cut where a turn was dropped"] == 1


def imported(chosen: DataRecipe, folder: Path, **fields: Any) -> dict[str, Any]:
    """The import ledger of the one file of a recipe."""
    (folder / "import").mkdir(exist_ok=True)
    source = chosen.sources[0].model_copy(update=fields)
    work = WorkFolder(folder, chosen.model_copy(update={"sources": [source]}), tuple(raw_files(chosen)[0]))
    ledger: dict[str, Any] = ImportFile(work)("f00000")["import"]
    return ledger


def test_a_wrong_encoding_is_refused_and_single_damaged_characters_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("question;answer\nWie?;Sehr schön\nWas?;Nichts\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"x\.csv: the text is not UTF-8.*cp1252"):
        imported(recipe(tmp_path / "x.csv"), tmp_path)
    found = imported(recipe(tmp_path / "x.csv"), tmp_path, encoding="cp1252")
    assert found["kept"] == 2 and not found["changed"]
    with pytest.raises(ConfigError, match=r"sources\.encoding='nonsense' is unknown"):
        imported(recipe(tmp_path / "x.csv"), tmp_path, encoding="nonsense")
    (tmp_path / "y.csv").write_bytes("question;answer\nWie?;Sehr schön äöü\nWas?;N".encode() + b"\xff\n")
    found = imported(recipe(tmp_path / "y.csv"), tmp_path)
    assert found["kept"] == 2 and sum(found["changed"].values()) == 1


SAYINGS = {
    "gb18030": "周末去爬山吗？去呀，几点集合？早上八点，东门见。",
    "big5": "週末去爬山嗎？去呀，幾點集合？早上八點，東門見。",
    "euc_kr": "안녕하세요 반갑습니다 오늘 저녁에 뭐 먹을까요",
    "euc_jp": "こんにちは、今日は何を食べますか。東京駅で会いましょう",
    "cp932": "こんにちは、今日は何を食べますか。東京駅で会いましょう",
    "cp1252": "Wie geht es Ihnen? Sehr schön, danke für die Äpfel größer",
    "cp1251": "Привет, как дела? Всё хорошо, спасибо большое",
    "koi8-r": "Привет, как дела? Всё хорошо, спасибо большое",
}


@pytest.mark.parametrize("encoding", SAYINGS)
def test_gb18030_is_recognised_and_other_encodings_are_not_taken_for_it(encoding: str) -> None:
    text = SAYINGS[encoding]
    assert text_encoding(text.encode(encoding)) == ("gb18030" if encoding == "gb18030" else None)
    assert text_encoding(text.encode()) == text_encoding(text.encode()[:-1]) == "utf-8"


@pytest.mark.parametrize("name", ["chat.jsonl", "chats.json"])
def test_gb18030_reads_as_utf8_does_in_lines_and_spans(name: str, tmp_path: Path) -> None:
    lines = [chat(f"今天天气怎么样呢 {n}") for n in range(400)]
    text = "".join(lines) if name.endswith("l") else "[" + ",".join(lines) + "]"
    (tmp_path / name).write_text(text, encoding="gb18030")
    found, _ = read(tmp_path / name)
    assert [c.turns[0].content for c in found] == [f"今天天气怎么样呢 {n}" for n in range(400)]
    (file,) = source_files(SourceSection(path=str(tmp_path / name)))
    spans = file.spans(2_000) if name.endswith("l") else [file]
    options = SourceSection(path=str(tmp_path / name), format="openai")
    assert [c.turns for span in spans for c in read_file(span, options, Ledger())] == [c.turns for c in found]
