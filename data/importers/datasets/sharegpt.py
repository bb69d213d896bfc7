"""ShareGPT: {"id", "conversations": [{"from": "human"|"gpt"|…, "value"}], "system"?, "tools"?}, an array or JSON lines.

`function_call` is a call of a tool, `observation` its answer. Also ms-swift's {"conversation": [{"human", "assistant"}, …]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Role, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..labels import role_of
from ..records import BadRecordError, Record, entry_of, read_records
from .openai_messages import call_line, called_in_text, carries_loss, kept_fields, note_message, system_turn, thought_of

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
_LISTS = ("conversations", "conversation")


def recognise(head: bytes, name: str) -> bool:
    """Objects with a conversations list of from/value, or of human/assistant."""
    first = first_object(head)
    if first is None:
        return (
            head.lstrip()[:1] in (b"{", b"[") and b'"conversations"' in head[:4000] and b'"from"' in head and b'"value"' in head
        )
    turns = _items(first)
    if turns is None:
        return False
    return not turns or (isinstance(turns[0], dict) and ("from" in turns[0] or {"human", "assistant"} <= set(turns[0])))


def _items(record: Record) -> list[Any] | None:
    found: list[Any] | None = next((record[key] for key in _LISTS if isinstance(record.get(key), list)), None)
    return found


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All dialogues; one with an unknown speaker or a value that is not text is counted and skipped."""
    yield from read_records(json_lines(file, options.encoding, ledger), dialogue, file, source, ledger)


def dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    """Turns of a record."""
    items = _items(record)
    if items is None:
        raise BadRecordError("no conversations list", sorted(record)[:8])
    turns: list[Turn] = []
    for item in items:
        item = entry_of(item)
        if "from" not in item and ("human" in item or "assistant" in item):
            turns += [_turn(side, item.get(side), item) for side in ("human", "assistant") if item.get(side) is not None]
            continue
        turns.append(_turn(item.get("from"), item.get("value"), item))
        note_message({key: value for key, value in item.items() if key not in ("from", "value")}, origin, ledger)
    return [*system_turn(record, turns), *called_in_text(turns, origin, ledger)], kept_fields(record)


def _turn(speaker: Any, value: Any, item: Record) -> Turn:
    role = _ROLES.get(speaker) or role_of(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(value, str):
        raise BadRecordError("bad message", f"from={speaker!r}, value is a {type(value).__name__}")
    calls = 0
    if speaker == "function_call":
        lines = _call_lines(value)
        value, calls = ("\n".join(lines), len(lines)) if lines else (value, 0)
    return Turn(role, value, loss=carries_loss(item), reasoning=thought_of(item) if role == "assistant" else None, calls=calls)


def _call_lines(value: str) -> list[str]:
    """The calls in a function_call; none if it is no JSON."""
    try:
        found = json.loads(value)
        return [call_line(call) for call in (found if isinstance(found, list) else [found])]
    except (ValueError, RecursionError):
        return []
