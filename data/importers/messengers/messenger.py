"""Messenger and Instagram, "download your information" as JSON: {"messages": [{sender_name, timestamp_ms, content}], …}.

These files hold UTF-8 whose bytes were written as Latin-1 characters (`å¥½` for 好); texts are repaired where that is so. The
files of encrypted chats, {"threadName", "messages": [{senderName, timestamp, text}]}, are right as they are. Messages stand the
newest first, and a long chat in message_1.json, message_2.json …, each of which is read as a log of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...cleaning.placeholders import placeholder
from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_fields import object_items
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import chats
from ..records import Record, read_messages, text_of
from .dated import seconds_of

_THING = r"(?:an? )?(?:attachment|photo|video|voice message|GIF|sticker|link|location)"
_WRITTEN_BY_THE_APP = re.compile(
    rf"Liked a message|Reacted .{{1,12}} to (?:your|a) message\s*|(?:You|.{{1,60}}) sent {_THING}(?: to .{{1,60}})?\.?"
    r"|.{1,60} (?:unsent a message|missed (?:your|a) (?:video )?call|(?:started a|joined the) (?:video )?(?:call|chat))\.?"
    r"|The (?:video )?(?:call|chat) ended\.?"
)


def recognise(head: bytes, name: str) -> bool:
    """Keys of a message in either layout."""
    if head.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] != b"{" or b'"messages"' not in head:
        return False
    return (b'"sender_name"' in head and b'"timestamp_ms"' in head) or (b'"threadName"' in head and b'"senderName"' in head)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one chat in order of time, cut at silences."""
    yield from chats((("", message) for message in messages(file, options, ledger)), file, options, source, ledger)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message with text, as the file has them."""
    entries = enumerate((value for key, value in object_items(file, {"messages"}, options.encoding) if key == "messages"), 1)
    numbers: list[int] = []

    def numbered() -> Iterator[Any]:
        for number, entry in entries:
            numbers[:] = [number]
            yield entry

    def reader(entry: Record) -> ChatMessage | str:
        return _message(entry, numbers[0])

    yield from read_messages(numbered(), reader, file, ledger)


def _message(entry: Record, number: int) -> ChatMessage | str:
    """A message, or why it is left out."""
    sender = repaired(text_of(entry.get("sender_name", entry.get("senderName")), "sender"))
    text = entry.get("content", entry.get("text"))
    if entry.get("is_unsent") or entry.get("isUnsent"):
        return "deleted message left out"
    text = repaired(text_of(text)) if text else ""
    if entry.get("type") in ("Call", "call", "Unsubscribe", "Subscribe") or entry.get("call_duration") is not None:
        return "service entry left out"
    if not text.strip() or placeholder(text) or _WRITTEN_BY_THE_APP.fullmatch(text):
        return "media left out"
    return ChatMessage(sender, text, seconds_of(entry.get("timestamp_ms", entry.get("timestamp"))), str(number))


def repaired(text: str) -> str:
    """A text whose UTF-8 was written as Latin-1 characters, as it was meant; any other unchanged."""
    if text.isascii():
        return text
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text
