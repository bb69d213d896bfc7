"""DeepSeek's data export, conversations.json: trees as in ChatGPT's, whose messages are made of fragments.

    [{"title", "inserted_at", "mapping": {id: {parent, children, message: {"fragments": [{"type": "REQUEST", "content"}]}}}}]

REQUEST is the user, RESPONSE the assistant, THINK the assistant's thought, which stays beside the reply. Searches and other
fragments are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ...conversation import Conversation, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..messengers.dated import seconds_of
from ..records import BadRecordError, Record, entry_of, read_records, text_of
from ..unread import Unread
from .branches import shown_branch

_REPLIES = ("RESPONSE", "TEMPLATE_RESPONSE")


def recognise(head: bytes, name: str) -> bool:
    """A mapping of nodes and DeepSeek's inserted_at or fragments."""
    first = first_object(head)
    if first is not None:
        return isinstance(first.get("mapping"), dict) and ("inserted_at" in first or b'"fragments"' in head)
    start = head[:4000]
    return head.lstrip()[:1] in (b"{", b"[") and b'"mapping"' in start and b'"inserted_at"' in start


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per conversation."""
    reader = partial(_dialogue, Unread(ledger))
    yield from read_records(json_lines(file, options.encoding, ledger), reader, file, source, ledger, "mapping")


def _dialogue(unread: Unread, record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    unread.ledger = ledger
    nodes = record.get("mapping")
    path = shown_branch(nodes, record.get("current_node")) if isinstance(nodes, dict) else []
    if not isinstance(nodes, dict) or not path:
        raise BadRecordError("no path through the conversation", record.get("title"))
    if aside := sum(isinstance(node, dict) and node.get("message") is not None for node in nodes.values()) - sum(
        nodes[key].get("message") is not None for key in path
    ):
        ledger.change("message of another branch left out", f"{origin}: {record.get('title')}", aside)
    turns: list[Turn] = []
    for key in path:
        if (message := nodes[key].get("message")) is not None:
            turns += _turns(entry_of(message), origin, unread)
    return turns, {"title": str(record.get("title") or "")}


def _turns(message: Record, origin: str, unread: Unread) -> list[Turn]:
    """What one message says: a request, a reply with its thought, or nothing."""
    ledger = unread.ledger
    asked, replied, thoughts = list[str](), list[str](), list[str]()
    for fragment in map(entry_of, message.get("fragments") or ()):
        kind = fragment.get("type")
        if kind == "REQUEST":
            asked.append(text_of(fragment.get("content")))
        elif kind in _REPLIES:
            replied.append(text_of(fragment.get("content")))
        elif kind == "THINK":
            thoughts.append(text_of(fragment.get("content")))
        else:
            ledger.change("call or answer of a tool left out", f"{origin}: {kind}")
    if message.get("files"):
        ledger.change("picture, sound or file left out of a message", origin, len(message["files"]))
    if not unread.is_known(message):
        unread.note(message, [*asked, *replied, *thoughts], origin)
    time = seconds_of(message.get("inserted_at"))
    turns = [Turn("user", "\n\n".join(asked), time=time)] if asked else []
    if replied:
        thought = "\n\n".join(thoughts).strip() or None
        turns.append(Turn("assistant", "\n\n".join(replied), time=time, reasoning=thought))
    elif thoughts:
        ledger.change("thought without a reply left out", origin)
    return turns
