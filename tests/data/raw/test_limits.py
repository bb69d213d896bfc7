"""A small file can unpack to one line of gigabytes, or hold thousands of members: memory and time stay within stated limits."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation
from chatmill.data.importers.registry import read_file, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.raw import compressed, files, limits
from chatmill.data.raw.compressed import open_zip
from chatmill.data.raw.json_text import JsonText
from chatmill.data.raw.limits import RECORD_CHARS, TOO_LONG, bounded_lines
from chatmill.data.recipe import SourceSection

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def read(path: Path, kind: str = "auto") -> tuple[list[Conversation], Ledger]:
    ledger, section = Ledger(), SourceSection(path=str(path), format=kind)
    return [found for file in source_files(section) for found in read_file(file, section, ledger)], ledger


def packed_with(path: Path, before: bytes, filling: bytes, times: int, after: bytes) -> Path:
    """A .gz of a megabyte or less."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(before)
        for _ in range(times):
            file.write(filling)
        file.write(after)
    return path


LINE = json.dumps(GOOD).encode()
FILLING = b"x" * (1 << 20)
LONG = RECORD_CHARS // (1 << 20) + 8  # times FILLING
WHATSAPP = b"[01.05.23, 21:15:00] Ann: hi\n[01.05.23, 21:16:00] Bob: ho\n"
LINE_OUT = f"line {TOO_LONG} left out"
LONG_RECORDS: dict[str, tuple[str, str, bytes, bytes, str]] = {  # file, format, before, after, what is counted
    "a line": ("x.jsonl.gz", "openai", LINE + b'\n{"messages": "', b'"}\n' + LINE, TOO_LONG),
    "an element": ("x.json.gz", "openai", b"[" + LINE + b',{"messages": "', b'"},' + LINE + b"]", TOO_LONG),
    "a chat's line": ("x.txt.gz", "whatsapp", WHATSAPP, b"\n" + WHATSAPP.replace(b"05.23", b"06.23"), LINE_OUT),
    "a cell": ("x.csv.gz", "csv", b"prompt,reply\nq,a\n", b",a\nq,a\n", "row that is not CSV"),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_RECORDS)
def test_a_record_beyond_the_limit_is_dropped_counted_and_never_in_memory_as_a_whole(name: str, tmp_path: Path) -> None:
    file, kind, before, after, reason = LONG_RECORDS[name]
    path = packed_with(tmp_path / file, before, FILLING, LONG, after)
    tracemalloc.start()
    found, ledger = read(path, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [[turn.content.strip()[:1] for turn in c.turns] for c in found] in ([["q", "a"]] * 2, [["h", "h"]] * 2)
    assert (ledger.dropped + ledger.changed)[reason] == 1
    assert peak < 5 * RECORD_CHARS


def test_a_message_of_endless_lines_is_cut_at_the_limit_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECORD_CHARS", 1000)
    (tmp_path / "x.txt").write_bytes(WHATSAPP + b"more and more\n" * 500)
    (found,), ledger = read(tmp_path / "x.txt", "whatsapp")
    assert len(found.turns[1].content) <= 1000
    assert ledger.changed[f"line of a message {TOO_LONG} left out"] == 500 - found.turns[1].content.count("more and more")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.xz", "x.zip"])
def test_a_file_that_unpacks_to_far_more_than_chats_do_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNPACKED_FREE", 1 << 18)
    data = (LINE + b"\n") + b"\n" * (1 << 20)
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.jsonl", data)
    else:
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else lzma.compress(data))
    with pytest.raises(ConfigError, match=r"source x\S+: .*unpack to more than 262,144 bytes plus 200 times its size"):
        read(tmp_path / name, "openai")
    monkeypatch.setattr(limits, "UNPACKED_FREE", 1 << 24)
    compressed._opened.cache_clear()
    assert len(read(tmp_path / name, "openai")[0]) == 1


def test_a_zip_with_a_password_is_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.jsonl", LINE)
    raw = bytearray((tmp_path / "x.zip").read_bytes())
    raw[6] |= 1  # "encrypted", of the member and of the directory
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(ConfigError, match="it has a password"):
        read(tmp_path / "x.zip")


def test_members_of_a_zip_are_read_in_linear_time(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for k in range(1500):
            archive.writestr(f"{k}.jsonl", LINE)
    compressed._opened.cache_clear()
    start = time.process_time()
    assert len(read(tmp_path / "x.zip", "openai")[0]) == 1500
    with open_zip(tmp_path / "x.zip") as one, open_zip(tmp_path / "x.zip") as other:
        assert one is other  # its directory is read once
    assert time.process_time() - start < 10  # it took a minute


JSON_FILES: dict[str, tuple[str, int, int]] = {  # text, dialogues kept, records dropped
    "two arrays": (json.dumps([GOOD, GOOD]) + "\n" + json.dumps([GOOD] * 3), 5, 0),
    "two printed arrays": (json.dumps([GOOD] * 2, indent=1) + json.dumps([GOOD] * 3, indent=1), 5, 0),
    "lines behind an array": (json.dumps([GOOD]) + "\n" + "\n".join([json.dumps(GOOD)] * 3), 4, 0),
    "rubbish behind an array": (json.dumps([GOOD]) + "\nand so on\n" + json.dumps(GOOD), 2, 1),
    "arrays in an array": (json.dumps([[GOOD, GOOD], [GOOD], []]), 3, 1),
    "an array per line": ("\n".join([json.dumps([GOOD, GOOD])] * 3), 6, 0),
    "an object over several lines": (json.dumps(GOOD, indent=2), 1, 0),
    "such an object among lines": ("\n".join([json.dumps(GOOD), json.dumps(GOOD, indent=2), json.dumps(GOOD)]), 3, 0),
    "an object that does not end": (json.dumps(GOOD) + '\n{"messages": [\n' + json.dumps(GOOD), 2, 1),
    "two objects in a line": (json.dumps(GOOD) * 2 + "\n" + json.dumps(GOOD), 3, 0),
    "rubbish behind an object": (json.dumps(GOOD) + " and so on\n" + json.dumps(GOOD), 2, 1),
    "numbers": ("1 2\n[3]\n" + json.dumps(GOOD), 1, 3),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_all_of_a_json_file_is_kept_or_counted(name: str, tmp_path: Path) -> None:
    text, kept, dropped = JSON_FILES[name]
    (tmp_path / "x.jsonl").write_text(text)
    found, ledger = read(tmp_path / "x.jsonl", "openai")
    assert (len(found), ledger.dropped.total()) == (kept, dropped), ledger.dropped
    assert len({c.origin for c in found}) == kept


def test_objects_over_several_lines_are_whole_in_every_span(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(GOOD, indent=1) for _ in range(50)))
    spans = files.RawFile(path).spans(300)
    section, ledger = SourceSection(path=str(path), format="openai"), Ledger()
    found = [c for span in spans for c in read_file(span, section, ledger)]
    assert len(spans) > 10 and len(found) == 50 and not ledger.dropped
    assert [c.origin for c in found] == [c.origin for c in read(path, "openai")[0]]


@pytest.mark.parametrize("kind", ["telegram", "messenger", "discord"])
def test_a_second_export_behind_the_first_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"messages": []}\n{"messages": []}')
    with pytest.raises(ConfigError, match=r"x\.json: more stands behind the end of the JSON"):
        read(tmp_path / "x.json", kind)


def test_a_row_that_swallows_others_counts_as_all_of_them(tmp_path: Path) -> None:
    rows = ["prompt,reply", *["q,a"] * 3, 'q,"a', *["q,a"] * 6]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    found, ledger = read(tmp_path / "x.csv")
    assert len(found) + ledger.dropped.total() >= 10, ledger.dropped


def test_lines_are_those_of_the_stream() -> None:
    text = "a\r\nb\n\nc"
    lines = list(bounded_lines(io.StringIO(text, newline="")))
    assert lines == [(1, "a\r\n"), (2, "b\n"), (3, "\n"), (4, "c")]
    assert list(bounded_lines(JsonText(io.StringIO(text, newline="")))) == lines


def test_a_value_is_read_over_by_its_brackets() -> None:
    value: Any = {"a": ['"]', "\\", {"b": "}{"}], "c": "[[["}
    text = JsonText(io.StringIO(json.dumps(value) + ", 5"))
    text.skip_value()
    assert text.value() == 5
