"""DiscordChatExporter's JSON: {"guild", "channel", "messages": [{id, type, timestamp, content, author, reference?}], …}.

`messageCount` closes it; a file with another number of messages is reported. Bots are left out unless one is the assistant.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_fields import object_items
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations


def recognise(head: bytes, name: str) -> bool:
    """A guild and a channel."""
    return head.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{" and b'"guild"' in head[:2000] and b'"channel"' in head[:4000]


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one channel: replies first, then silences."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message that a person typed. The sender is the account's id; options.assistant may give its name or id."""
    seen, announced = 0, None
    for key, entry in object_items(file, {"messages"}, options.encoding):
        if key == "messageCount":
            announced = int(entry)
        if key != "messages":
            continue
        seen += 1
        author = entry.get("author") or {}
        names = {str(author.get(field)) for field in ("id", "name", "nickname") if author.get(field)}
        where = f"{file.label}:{entry.get('id')}"
        if entry.get("type") not in ("Default", "Reply", 0, 19):
            ledger.change("service entry left out", f"{where}: {entry.get('type')}")
            continue
        if author.get("isBot") and options.assistant not in names:
            ledger.change("bot left out", f"{where}: {author.get('name')}")
            continue
        text = entry.get("content") or ""
        if not text.strip():
            ledger.change("media left out", where)
            continue
        sender = (
            options.assistant
            if options.assistant in names and options.assistant
            else str(author.get("id") or author.get("name"))
        )
        reply = (entry.get("reference") or {}).get("messageId")
        yield ChatMessage(
            sender, text, _seconds(entry.get("timestamp")), str(entry.get("id", "")), str(reply) if reply else None
        )
    if announced is not None and announced != seen:
        ledger.change("file announces another number of messages", f"{file.label}: {announced} announced, {seen} there")


def _seconds(stamp: str | None) -> float | None:
    try:
        return datetime.fromisoformat(stamp).timestamp() if stamp else None
    except ValueError:
        return None
