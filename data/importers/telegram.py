"""Telegram Desktop's `result.json`: one chat (`{"name", "type", "id", "messages"}`) or a whole account (`chats.list`).

`text` is a string or a list of strings and {"type", "text"} parts; service entries and messages without text are counted out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from chatmill.data.conversation import Conversation
from chatmill.data.importers.json_fields import object_items
from chatmill.data.importers.messages import ChatMessage
from chatmill.data.importers.raw_file import RawFile
from chatmill.data.importers.rebuild import conversations
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection


def recognise(head: bytes, name: str) -> bool:
    """Telegram's own keys near the top."""
    return head.lstrip()[:1] == b"{" and (
        b'"date_unixtime"' in head or b'"from_id"' in head or b"Here is the data you requested" in head
    )


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of every chat in the file."""
    chat = (
        value for key, value in object_items(file, {"messages"}, options.encoding) if key == "messages" or _chats(key, value)
    )
    first = next(chat, None)
    if first is None:
        return
    if "list" in first:
        for entry in first["list"]:
            log = messages(entry.get("messages", ()), file, ledger)
            yield from conversations(log, file, options, source, ledger, channel=str(entry.get("id", "")))
        return

    def all_messages() -> Iterator[dict[str, Any]]:
        yield first
        yield from chat

    yield from conversations(messages(all_messages(), file, ledger), file, options, source, ledger)


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


def _chats(key: str, value: Any) -> bool:
    return key == "chats" and isinstance(value, dict) and "list" in value


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
