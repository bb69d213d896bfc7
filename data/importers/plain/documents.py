"""Plain documents for pre-training: text files, or JSON lines with a `text` field. Every token carries loss.

A text file is one document; so that memory stays constant, a longer one is cut at paragraph ends near 100,000 characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection

DOCUMENT_CHARS = 100_000
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


def recognise(head: bytes, name: str) -> bool:
    """A file that calls itself text and is, or JSON lines with a text field and nothing of a chat."""
    if name.lower().endswith(_TEXT_SUFFIXES):
        return b"\0" not in head
    first = first_object(head)
    return (
        first is not None and isinstance(first.get("text"), str) and not {"messages", "conversations", "parent_id"} & set(first)
    )


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All documents."""
    if file.stem.lower().endswith((".jsonl", ".json", ".ndjson")):
        field = options.columns.get("text", "text")
        for number, record in json_lines(file, options.encoding, ledger):
            origin = f"{file.label}:{number}"
            text = record.get(field)
            if not isinstance(text, str) or not text.strip():
                ledger.drop("no text", f"{origin}: {sorted(record)[:8]}")
                continue
            ledger.keep()
            yield _document(text, source, origin, {key: record[key] for key in ("id", "url", "title") if key in record})
        return
    with file.text(options.encoding) as lines:
        piece: list[str] = []
        size, first = 0, 1
        for number, line in enumerate(lines, 1):
            if size >= DOCUMENT_CHARS and not line.strip():
                ledger.keep()
                yield _document("".join(piece), source, f"{file.label}:{first}", {})
                piece, size, first = [], 0, number + 1
                continue
            piece.append(line)
            size += len(line)
        if "".join(piece).strip():
            ledger.keep()
            yield _document("".join(piece), source, f"{file.label}:{first}", {})
        elif first == 1:
            ledger.drop("no text", file.label)


def _document(text: str, source: str, origin: str, meta: dict[str, Any]) -> Conversation:
    turn = Turn("assistant", text.replace("\r\n", "\n").strip("\n"))
    return Conversation(make_uid(source, origin), (turn,), source, origin, {**meta, "document": True})
