"""ShareGPT: {"id", "conversations": [{"from": "human"|"gpt"|"system"|…, "value"}]}, a JSON array or JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Role, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..records import BadRecordError, Record, read_records

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def recognise(head: bytes, name: str) -> bool:
    """Objects with a conversations list of from/value."""
    first = first_object(head)
    if first is None:
        return (
            head.lstrip()[:1] in (b"{", b"[") and b'"conversations"' in head[:4000] and b'"from"' in head and b'"value"' in head
        )
    turns = first.get("conversations")
    return isinstance(turns, list) and (not turns or (isinstance(turns[0], dict) and "from" in turns[0]))


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All dialogues; one with an unknown speaker or a value that is not text is counted and skipped."""
    yield from read_records(json_lines(file, options.encoding, ledger), dialogue, file, source, ledger)


def dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    """Turns of a record."""
    items = record.get("conversations")
    if not isinstance(items, list):
        raise BadRecordError("no conversations list", sorted(record)[:8])
    turns: list[Turn] = []
    for item in items:
        speaker, value = (item.get("from"), item.get("value")) if isinstance(item, dict) else (None, None)
        if speaker not in _ROLES or not isinstance(value, str):
            raise BadRecordError("bad message", f"from={speaker!r}, value is a {type(value).__name__}")
        turns.append(Turn(_ROLES[speaker], value, loss=float(item.get("weight", 1)) > 0))
    return turns, {"id": record["id"]} if "id" in record else {}
