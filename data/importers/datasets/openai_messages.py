"""OpenAI fine-tuning JSONL: one {"messages": [{"role", "content", "name"?, "weight"?}, …], …} per line.

content is a string, null, or a list of parts, of which only text is kept. weight 0 turns off a turn's loss.
Tool calls have no text form that all templates share, so they are rendered as JSON in the assistant's content.
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
from ..records import BadRecordError, Record, read_records

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def recognise(head: bytes, name: str) -> bool:
    """First line (or first element of an array) is an object with messages that have roles."""
    first = first_object(head)
    if first is None:
        return head.lstrip()[:1] in (b"{", b"[") and b'"messages"' in head[:4000] and b'"role"' in head and b'"content"' in head
    messages = first.get("messages")
    return isinstance(messages, list) and (not messages or (isinstance(messages[0], dict) and "role" in messages[0]))


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All dialogues; a bad line is counted and skipped."""
    yield from read_records(json_lines(file, options.encoding, ledger), dialogue, file, source, ledger)


def dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    """Turns of a record."""
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise BadRecordError("no messages list", sorted(record)[:8])
    try:
        turns = [turn_of(message) for message in messages]
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecordError("bad message", error) from error
    for message in messages:
        if others := other_parts(message.get("content")):
            ledger.change("picture, sound or file left out of a message", f"{origin}: {others}", len(others))
    return turns, {key: record[key] for key in ("id", "license", "tools", "meta") if key in record}


def turn_of(message: dict[str, Any]) -> Turn:
    """One message as a turn. Raises KeyError, TypeError or ValueError."""
    role = message["role"]
    if role not in _ROLES:
        raise ValueError(f"unknown role {role!r}")
    text = _text(message.get("content"))
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if calls:
        rendered = "\n".join(json.dumps(call.get("function", call), ensure_ascii=False, sort_keys=True) for call in calls)
        text = f"{text}\n{rendered}" if text else rendered
    time = message.get("time")
    return Turn(
        _ROLES[role], text, message.get("name"), float(time) if time is not None else None, float(message.get("weight", 1)) > 0
    )


def other_parts(content: Any) -> list[str]:
    """Kinds of the parts that have no text: image_url, input_audio, file."""
    parts = content if isinstance(content, list) else []
    return [str(part.get("type")) for part in parts if isinstance(part, dict) and not isinstance(part.get("text"), str)]


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)
    raise ValueError(f"content is a {type(content).__name__}")
