"""The chats of the PyPI package `chitchat-dataset`: two strangers talk about anything (BYU Chit-Chat Challenge, MIT licence).

{chat id: {"messages": [[{"text", "timestamp", "sender"}, …], …], "prompt", "ratings", "start"}}; the inner lists are one
sender's messages in a row. The first speaker becomes the user, the other one the assistant.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from chatmill.config import ConfigError

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_fields import object_items
from ...recipe import SourceSection
from ..messages import ChatMessage, to_conversation
from ..messengers.dated import seconds_of
from ..records import MALFORMED, Record, entry_of, read_messages
from ..unread import Unread


def installed_file() -> RawFile:
    """dataset.json of the installed package, found without running the package."""
    found = importlib.util.find_spec("chitchat_dataset")
    if found is None or found.origin is None:
        raise ConfigError(
            "source chitchat: the package is not installed. Run: pip install chitchat-dataset, or give its dataset.json"
        )
    return RawFile(Path(found.origin).parent / "dataset.json")


def recognise(head: bytes, name: str) -> bool:
    """A JSON object of chats whose messages are lists of lists."""
    start = b"".join(head[:2000].split())
    return start.startswith(b'{"') and b'"messages":[[{' in start and b'"sender"' in head


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All chats in file order."""
    unread = Unread(ledger)
    for key, chat in object_items(file, set(), options.encoding):
        try:
            groups = [group if isinstance(group, list) else [group] for group in entry_of(chat).get("messages") or []]
        except MALFORMED as error:
            ledger.drop("bad record", f"{file.label}:{key}: {error}")
            continue
        messages = list(read_messages((message for group in groups for message in group), _message, file, ledger, unread))
        found = to_conversation(
            messages,
            source=source,
            origin=f"{file.label}:{key}",
            ledger=ledger,
            assistant=options.assistant,
            meta={"chat": key},
        )
        if found is not None:
            yield found


def _message(entry: Record) -> ChatMessage | str:
    return ChatMessage(str(entry["sender"]), entry["text"], seconds_of(entry.get("timestamp")))
