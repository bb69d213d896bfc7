"""Rows of a table, CSV or Parquet/Arrow, by a map from our fields to its columns.

sources.columns, one of:
    prompt, reply [, system]             one dialogue per row
    text                                 one document per row
    conversation, role | sender, content [, time]   one message per row; rows of a conversation are adjacent
Parquet rows that hold `messages`, `conversations` or `instruction` columns need no map. Parquet needs the package pyarrow.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from chatmill.config import ConfigError

from ...conversation import Conversation, Role, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...recipe import SourceSection
from ..messages import ChatMessage, to_conversation
from ..records import BadRecordError, Record, read_records

_USUAL = {
    "prompt": ("prompt", "question", "query", "input", "user"),
    "reply": ("reply", "response", "answer", "completion", "output", "assistant"),
    "text": ("text", "document"),
    "conversation": (
        "conversation",
        "conversation_id",
        "dialogue_id",
        "dialog_id",
        "thread",
        "thread_id",
        "topic_id",
        "chat_id",
    ),
    "role": ("role",),
    "sender": ("sender", "author", "speaker", "from", "user_id"),
    "content": ("content", "message", "utterance", "text", "body"),
    "time": ("time", "timestamp", "date"),
    "system": ("system",),
}
_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "system": "system",
}


def column_map(names: list[str], given: Mapping[str, str], label: str) -> dict[str, str]:
    """Our field -> column, from sources.columns or from usual column names."""
    missing = [column for column in given.values() if column not in names]
    if missing:
        raise ConfigError(f"{label}: sources.columns names {missing}, the table has {names}")
    if given:
        unknown = sorted(set(given) - set(_USUAL))
        if unknown:
            raise ConfigError(f"{label}: sources.columns has {unknown}; known fields: {', '.join(_USUAL)}")
        return dict(given)
    lower = {name.strip().lower(): name for name in names}
    found = {field: next((lower[n] for n in usual if n in lower), "") for field, usual in _USUAL.items()}
    if found["conversation"] and found["content"] and (found["role"] or found["sender"]):
        keep: tuple[str, ...] = ("conversation", "role", "sender", "content", "time")
    elif found["prompt"] and found["reply"]:
        keep = ("prompt", "reply", "system")
    elif found["text"]:
        keep = ("text",)
    else:
        raise ConfigError(
            f"{label}: the columns {names} have no usual names. Say in the recipe which is which, "
            f"sources: - {{path: …, columns: {{prompt: {json.dumps(names[0], ensure_ascii=False)}, "
            f"reply: {json.dumps(names[-1], ensure_ascii=False)}}}}} for a dialogue per row, "
            "{text: …} for a document per row, {conversation: …, sender: …, content: …} for a message per row."
        )
    return {field: found[field] for field in keep if found[field]}


def rows_to_conversations(
    rows: Iterator[tuple[int, Record]],
    columns: Mapping[str, str],
    file: RawFile,
    options: SourceSection,
    source: str,
    ledger: Ledger,
) -> Iterator[Conversation]:
    """Dialogues or documents of numbered rows."""
    if "content" in columns:
        yield from _grouped(rows, columns, file, options, source, ledger)
        return

    def dialogue(row: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
        cell = {field: str(row.get(column) or "") for field, column in columns.items()}
        if not all(cell[field].strip() for field in ("prompt", "reply", "text") if field in cell):
            raise BadRecordError("empty cell", list(cell.values())[:2])
        if "text" in cell:
            return [Turn("assistant", cell["text"])], {"document": True}
        turns = [Turn("system", cell["system"])] if cell.get("system") else []
        return [*turns, Turn("user", cell["prompt"]), Turn("assistant", cell["reply"])], {}

    yield from read_records(rows, dialogue, file, source, ledger)


def _grouped(
    rows: Iterator[tuple[int, Record]],
    columns: Mapping[str, str],
    file: RawFile,
    options: SourceSection,
    source: str,
    ledger: Ledger,
) -> Iterator[Conversation]:
    speaker = columns.get("role") or columns.get("sender")
    if speaker is None:
        raise ConfigError(f"{file.label}: sources.columns has content but neither role nor sender")
    group: list[ChatMessage] = []
    last: str | None = None

    def finish() -> Iterator[Conversation]:
        if not group:
            return
        origin = f"{file.label}:{group[0].key}"
        if "role" in columns and all(m.sender.lower() in _ROLES for m in group):
            turns = tuple(Turn(_ROLES[m.sender.lower()], m.text, time=m.time) for m in group)
            ledger.keep()
            yield Conversation(make_uid(source, origin), turns, source, origin, {"conversation": last})
            return
        found = to_conversation(
            group, source=source, origin=origin, ledger=ledger, assistant=options.assistant, meta={"conversation": last}
        )
        if found is not None:
            yield found

    for number, row in rows:
        key = str(row.get(columns["conversation"])) if "conversation" in columns else ""
        if key != last:
            yield from finish()
            group = []
        last = key
        time = row.get(columns["time"]) if "time" in columns else None
        try:
            seconds = float(time) if time not in (None, "") else None
        except (TypeError, ValueError):
            seconds = None
        group.append(ChatMessage(str(row.get(speaker) or ""), str(row.get(columns["content"]) or ""), seconds, str(number)))
    yield from finish()


def recognise(head: bytes, name: str) -> bool:
    """By name: .csv and .tsv."""
    return name.lower().endswith((".csv", ".tsv"))


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """CSV or TSV with a header row; cells may hold line feeds; a row number counts records, the header is row 1."""
    csv.field_size_limit(min(sys.maxsize, 1 << 27))
    with file.text(options.encoding) as text:
        delimiter = "\t" if file.stem.lower().endswith(".tsv") else _delimiter(file.head())
        reader = csv.reader(text, delimiter=delimiter)
        header = next(reader, None)
        if header is None:
            ledger.drop("empty table", file.label)
            return
        columns = column_map(header, options.columns, file.label)

        def rows() -> Iterator[tuple[int, dict[str, str]]]:
            for number, row in enumerate(reader, 2):
                if len(row) != len(header):
                    ledger.drop(
                        "row with another number of cells", f"{file.label}:{number}: {len(row)} instead of {len(header)}"
                    )
                    continue
                yield number, dict(zip(header, row, strict=True))

        yield from rows_to_conversations(rows(), columns, file, options, source, ledger)


def _delimiter(head: bytes) -> str:
    """Comma, semicolon (spreadsheets of many countries), tab or bar: whichever the header row has most of, outside quotes."""
    header = re.sub(r'"[^"]*"', "", head.decode("utf-8", "replace").split("\n")[0])
    return max(",;\t|", key=header.count)


def json_cell(value: Any) -> Any:
    """A cell that holds JSON text, decoded; anything else unchanged."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
