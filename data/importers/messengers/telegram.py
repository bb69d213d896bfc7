"""Telegram Desktop's `result.json`: one chat (`{"name", "type", "id", "messages"}`) or a whole account (`chats.list`).

`text` is a string or a list of strings and {"type", "text"} parts; service entries and messages without text are left out and
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_fields import OPENED, walk
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations


def recognise(head: bytes, name: str) -> bool:
    """Telegram's own keys near the top."""
    return head.lstrip()[:1] == b"{" and (
        b'"date_unixtime"' in head or b'"from_id"' in head or b"Here is the data you requested" in head
    )


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of every chat in the file, one message of it in memory at a time."""
    for (_, channel), group in groupby(entries(file, options.encoding), key=lambda item: item[:2]):
        log = messages((entry for *_, entry in group), file, ledger)
        yield from conversations(log, file, options, source, ledger, channel=channel)


_ACCOUNT = ("chats", "left_chats")
_ENTERED = {(), ("messages",)} | {
    (name, "list", "*", "messages")[:depth] for name in _ACCOUNT for depth in range(1, 5)
}  # fmt: skip


def entries(file: RawFile, encoding: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number of the chat, its id, message); a file of one chat has the number 0 and needs no id."""
    number, channel = 0, ""
    for path, value in walk(file, _ENTERED, encoding):
        if value is OPENED:
            number, channel = number + 1, ""
        elif len(path) == 4 and path[1:] == ("list", "*", "id"):
            channel = str(value)
        elif path[-2:] == ("messages", "*") and isinstance(value, dict):
            yield number, channel, value


def messages(entries: Iterable[dict[str, Any]], file: RawFile, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message with text."""
    for entry in entries:
        where = f"{file.label}:{entry.get('id')}"
        if entry.get("type") != "message":
            ledger.change("service entry left out", f"{where}: {entry.get('action', '')}")
            continue
        text = _text(entry.get("text", ""))
        if not text.strip():
            ledger.change("media left out", f"{where}: {entry.get('media_type', 'file' if 'file' in entry else 'photo')}")
            continue
        sender = entry.get("from_id") or entry.get("from") or "deleted account"
        reply = entry.get("reply_to_message_id")
        yield ChatMessage(str(sender), text, _seconds(entry), str(entry.get("id", "")), None if reply is None else str(reply))


def _text(text: Any) -> str:
    if isinstance(text, str):
        return text
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in text)


def _seconds(entry: dict[str, Any]) -> float | None:
    try:
        if "date_unixtime" in entry:
            return float(entry["date_unixtime"])
        return datetime.fromisoformat(entry["date"]).replace(tzinfo=UTC).timestamp()
    except (KeyError, ValueError):
        return None
