"""What a folder of exports holds: zips in zips, what people uploaded, what no format fits."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.data.build_cases import chats, recipe, tree, write_jsonl

from chatmill.config import ConfigError
from chatmill.data.importers.registry import read_file
from chatmill.data.ledger import Ledger
from chatmill.data.pipeline.inputs import raw_files
from chatmill.data.raw import compressed
from chatmill.data.raw.finding import find_files
from chatmill.data.recipe import SourceSection


def zipped(files: dict[str, str | bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


CHAT = "2023/5/1 21:15 - 小明: 在吗\n2023/5/1 21:16 - 丽丽: 在的，怎么了\n"
OTHER = "2023/5/2 21:15 - 老王: 吃饭了吗\n2023/5/2 21:16 - 丽丽: 吃了，你呢\n"


def test_a_zip_in_a_zip_is_opened_and_named(tmp_path: Path) -> None:
    inner = zipped({"_chat.txt": CHAT, "__MACOSX/._chat.txt": b"\0", ".DS_Store": b"\0"})
    deepest = zipped({"b/_chat.txt": OTHER})
    (tmp_path / "all.zip").write_bytes(
        zipped({"a.zip": inner, "notes.png": b"\x89PNG", "more.zip": zipped({"b.zip": deepest})})
    )
    files, left_out = raw_files(recipe(tmp_path))
    assert left_out == ["all.zip!notes.png"]
    assert [file.label for _, file in files] == ["all.zip!a.zip!_chat.txt", "all.zip!more.zip!b.zip!b/_chat.txt"]
    said = [
        [turn.content for turn in conversation.turns]
        for _, file in files
        for conversation in read_file(file, SourceSection(path="x"), Ledger())
    ]
    assert said == [["在吗", "在的，怎么了"], ["吃饭了吗", "吃了，你呢"]]


def test_a_zip_that_would_not_end_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = zipped({"_chat.txt": CHAT})
    for level in range(4):
        packed = zipped({f"{level}.zip": packed})
    (tmp_path / "deep.zip").write_bytes(packed)
    with pytest.raises(ConfigError, match=r"deep\.zip!3\.zip!2\.zip!1\.zip: '0\.zip' is one zip too many"):
        find_files(str(tmp_path))
    with monkeypatch.context() as small:
        small.setattr("chatmill.data.raw.limits.UNPACKED_FREE", 1 << 20)
        small.setattr("chatmill.data.raw.limits.UNPACKED_RATIO", 100)
        bomb = zipped({"bomb.zip": zipped({"x.txt": bytes(4 << 20)}, zipfile.ZIP_STORED)})
        (tmp_path / "bomb.zip").write_bytes(bomb)
        with pytest.raises(ConfigError, match=r"bomb\.zip: damaged.*unpack to more than"):
            find_files(str(tmp_path / "bomb.zip"))
    (tmp_path / "deep.zip").write_bytes(zipped({f"{k}.zip": zipped({"a.txt": CHAT}) for k in range(3)}))
    monkeypatch.setattr(compressed, "ZIPS_INSIDE", 2)
    with pytest.raises(ConfigError, match=r"'2\.zip' is one zip too many"):
        find_files(str(tmp_path))


def test_damaged_and_encrypted_zips_inside_are_named(tmp_path: Path) -> None:
    (tmp_path / "all.zip").write_bytes(zipped({"a.zip": b"PK\3\4 no zip at all"}))
    with pytest.raises(ConfigError, match=r"all\.zip!a\.zip: damaged"):
        find_files(str(tmp_path))
    locked = bytearray(zipped({"_chat.txt": CHAT}))
    locked[locked.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "all.zip").write_bytes(bytes(locked))
    with pytest.raises(ConfigError, match=r"all\.zip: '_chat\.txt': it has a password"):
        find_files(str(tmp_path))


def gpt(text: str) -> list[dict[str, Any]]:
    """One conversation as ChatGPT exports it."""
    ids = ("root", "u", "a")
    parents = dict(zip(ids, (None, "root", "u"), strict=True))
    said = {"u": ("user", text), "a": ("assistant", f"about {text}: gladly")}
    mapping = {
        key: {
            "id": key, "parent": parents[key], "children": [k for k in ids if parents[k] == key],
            "message": (key in said and {
                "author": {"role": said[key][0]}, "recipient": "all",
                "content": {"content_type": "text", "parts": [said[key][1]]},
            }) or None,
        }
        for key in ids
    }  # fmt: skip
    return [{"title": "t", "current_node": "a", "mapping": mapping}]


UUID = "67a1b2c3-0d4e-8000-9f12-0123456789ab"
EXPORT: dict[str, str | bytes] = {
    "conversations.json": json.dumps(gpt("tea")),
    "chat.html": "<html></html>",
    "user.json": json.dumps({"id": "u"}),
    "file-AbC123-my novel.txt": "A long text that somebody else wrote.\n" * 40,
    "dalle-generations/file-9f.md": "# words\n",
    f"{UUID}/notes.txt": "uploaded, too\n" * 9,
}


def test_what_people_uploaded_to_chatgpt_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "gpt.zip").write_bytes(zipped(EXPORT))
    (tmp_path / "raw" / "story.txt").write_text("A text of my own, to be learned as it is.\n")
    for name, content in EXPORT.items():  # the same, unpacked, with a file of somebody's own beside it
        place = tmp_path / "raw" / "unpacked" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "raw" / "unpacked" / "diary.txt").write_text("Mine as well, put there by hand.\n")
    files, left_out = raw_files(recipe(tmp_path / "raw"))
    assert [file.label for _, file in files] == [
        "gpt.zip!conversations.json",
        "story.txt",
        "conversations.json",
        "diary.txt",
    ]
    assert {"gpt.zip!file-AbC123-my novel.txt", f"gpt.zip!{UUID}/notes.txt"} < set(left_out)
    # A conversations.json on its own is no export: what lies beside it is read.
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "conversations.json").write_text(json.dumps(gpt("rain")))
    (tmp_path / "few" / "file-abc.txt").write_text("A text.\n")
    assert len(raw_files(recipe(tmp_path / "few"))[0]) == 2


def test_an_unknown_file_among_exports_is_named_and_changes_nothing(tmp_path: Path) -> None:
    from chatmill.data.pipeline.pipeline import build_dataset

    raw = tmp_path / "raw"
    raw.mkdir()
    write_jsonl(raw / "chats.jsonl", chats(60))
    build_dataset(recipe(raw), tmp_path / "a")
    for name, content in {
        "x.bin": bytes(range(256)),
        "empty.json": b"",
        "list.json": b"[1, 2]",
        "me.vcf": b"BEGIN:VCARD\n",
    }.items():
        (raw / name).write_bytes(content)
    report = build_dataset(recipe(raw), tmp_path / "b")
    assert sorted(report["files"]["left_out"]) == ["empty.json", "list.json", "me.vcf", "x.bin"]
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
