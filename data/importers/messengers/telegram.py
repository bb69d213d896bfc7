"""Telegram Desktop's `result.json`: one chat (`{"name", "type", "id", "messages"}`) or a whole account (`chats.list`).

`text` is a string or a list of strings and {"type", "text"} parts; service entries and messages without text are left out and
counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_fields import OPENED, walk
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations
from ..records import read_messages
from .dated import seconds_of


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


def entries(file: RawFile, encoding: str) -> Iterator[tuple[int, str, Any]]:
    """(number of the chat, its id, message); a file of one chat has the number 0 and needs no id."""
    number, channel = 0, ""
    for path, value in walk(file, _ENTERED, encoding):
        if value is OPENED:
            number, channel = number + 1, ""
        elif len(path) == 4 and path[1:] == ("list", "*", "id"):
            channel = str(value)
        elif path[-2:] == ("messages", "*") or path[-1:] == ("messages",):
            yield number, channel, value


def messages(entries: Iterable[Any], file: RawFile, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message with text."""
    yield from read_messages(entries, _message, file, ledger)


def _message(entry: dict[str, Any]) -> ChatMessage | str:
    """A message, or why it is left out."""
    if entry.get("type") != "message":
        return "service entry left out"
    text = _text(entry.get("text", ""))
    if not text.strip():
        return "media left out"
    sender = entry.get("from_id") or entry.get("from") or "deleted account"
    reply = entry.get("reply_to_message_id")
    time = seconds_of(entry["date_unixtime"] if "date_unixtime" in entry else entry.get("date"))
    return ChatMessage(str(sender), text, time, str(entry.get("id", "")), None if reply is None else str(reply))


def _text(text: Any) -> str:
    if isinstance(text, str):
        return text
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in text)
