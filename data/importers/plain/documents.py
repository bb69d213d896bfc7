"""Plain documents for pre-training: text files, or JSON lines with a `text` field. Every token carries loss.

A text file is one document. A text whose lines look like date and speaker is never guessed to be one: names and times would
be learned. `format: documents` reads it all the same. To keep memory constant, long files are cut at paragraph ends near
100,000 characters, and at the end of a line after a million.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ...conversation import Conversation, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..messengers.dated import looks_dated
from ..records import BadRecordError, Record, read_records

DOCUMENT_CHARS = 100_000
LONGEST_DOCUMENT = 10 * DOCUMENT_CHARS  # where no paragraph ends
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


def recognise(head: bytes, name: str) -> bool:
    """A text file by its suffix and content, or JSON lines with a text field and no fields of a chat."""
    if name.lower().endswith(_TEXT_SUFFIXES):
        return b"\0" not in head and not looks_dated(head)
    first = first_object(head)
    return (
        first is not None and isinstance(first.get("text"), str) and not {"messages", "conversations", "parent_id"} & set(first)
    )


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All documents."""
    if file.stem.lower().endswith((".jsonl", ".json", ".ndjson")):
        field = options.columns.get("text", "text")
        yield from read_records(json_lines(file, options.encoding, ledger), partial(_document, field), file, source, ledger)
        return
    found = False
    for number, text in _pieces(file, options.encoding):
        origin, found = f"{file.label}:{number}", True
        ledger.keep()
        yield Conversation(make_uid(source, origin), (_turn(text),), source, origin, {"document": True})
    if not found:
        ledger.drop("no text", file.label)


def _pieces(file: RawFile, encoding: str) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of each document in a text file; a line of many pieces counts as many lines."""
    with file.text(encoding) as lines:
        piece: list[str] = []
        size, first = 0, 1
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_DOCUMENT), ""), 1):
            if size >= LONGEST_DOCUMENT or (size >= DOCUMENT_CHARS and not line.strip()):
                if text := "".join(piece).strip("\r\n"):
                    yield first, text
                piece, size, first = [], 0, number + 1
                if not line.strip():
                    continue
                first = number
            piece.append(line)
            size += len(line)
        if "".join(piece).strip():
            yield first, "".join(piece)


def _document(field: str, record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    text = record.get(field)
    if not isinstance(text, str) or not text.strip():
        raise BadRecordError("no text", sorted(record)[:8])
    return [_turn(text)], {key: record[key] for key in ("id", "url", "title") if key in record} | {"document": True}


def _turn(text: str) -> Turn:
    return Turn("assistant", text.replace("\r\n", "\n").strip("\n"))
