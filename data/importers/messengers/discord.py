"""DiscordChatExporter's JSON: {"guild", "channel", "messages": [{id, type, timestamp, content, author, reference?}], …}.

`messageCount` closes it; a file with another number of messages is reported. Bots are left out unless one is the assistant.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_fields import object_items
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations
from ..records import read_messages
from .dated import seconds_of


def recognise(head: bytes, name: str) -> bool:
    """A guild and a channel."""
    return head.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{" and b'"guild"' in head[:2000] and b'"channel"' in head[:4000]


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one channel: replies first, then silences."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message that a person typed. The sender is the account's id; options.assistant may give its name or id."""
    seen, announced = 0, None

    def entries() -> Iterator[Any]:
        nonlocal seen, announced
        for key, entry in object_items(file, {"messages"}, options.encoding):
            if key == "messageCount":
                announced = entry
            elif key == "messages":
                seen += 1
                yield entry

    yield from read_messages(entries(), partial(_message, options.assistant), file, ledger)
    if announced is not None and announced != seen:
        ledger.change("file announces another number of messages", f"{file.label}: {announced} announced, {seen} there")


def _message(assistant: str | None, entry: dict[str, Any]) -> ChatMessage | str:
    """A message, or why it is left out."""
    author = entry.get("author") or {}
    names = {str(author.get(field)) for field in ("id", "name", "nickname") if author.get(field)}
    if entry.get("type") not in ("Default", "Reply", 0, 19):
        return "service entry left out"
    if author.get("isBot") and assistant not in names:
        return "bot left out"
    text = entry.get("content") or ""
    if not text.strip():
        return "media left out"
    sender = assistant if assistant is not None and assistant in names else str(author.get("id") or author.get("name"))
    reply = (entry.get("reference") or {}).get("messageId")
    return ChatMessage(
        sender, text, seconds_of(entry.get("timestamp")), str(entry.get("id", "")), str(reply) if reply else None
    )
