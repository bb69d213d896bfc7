"""Claude's data export, conversations.json: [{"uuid", "name", "chat_messages": [{"sender", "text", "content": [parts]}]}].

Of the parts, `text` is said, `thinking` is the reply's thought; calls and answers of tools are left out and counted, and so are
attachments. Where messages name their parents, the branch that ends in the last message is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Role, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..messengers.dated import seconds_of
from ..records import BadRecordError, Record, entry_of, read_records, text_of

_ROLES: dict[str, Role] = {"human": "user", "user": "user", "assistant": "assistant"}


def recognise(head: bytes, name: str) -> bool:
    """Objects with chat_messages."""
    first = first_object(head)
    if first is not None:
        return isinstance(first.get("chat_messages"), list)
    return head.lstrip()[:1] in (b"{", b"[") and b'"chat_messages"' in head and b'"sender"' in head


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per conversation."""
    yield from read_records(json_lines(file, options.encoding, ledger), _dialogue, file, source, ledger)


def _dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    messages = record.get("chat_messages")
    if not isinstance(messages, list) or not messages:
        raise BadRecordError("no chat_messages", record.get("name"))
    branch = _branch([entry_of(message) for message in messages])
    if aside := len(messages) - len(branch):
        ledger.change("message of another branch left out", f"{origin}: {record.get('name')}", aside)
    turns = [turn for message in branch if (turn := _turn(message, origin, ledger)) is not None]
    return turns, {"title": str(record.get("name") or "")}


def _branch(messages: list[Record]) -> list[Record]:
    """The messages from the first to the last along their parents; all of them where they name none."""
    by_id = {str(message["uuid"]): message for message in messages if message.get("uuid")}
    if len(by_id) < len(messages) or not any(str(message.get("parent_message_uuid")) in by_id for message in messages):
        return messages
    path: list[Record] = []
    seen: set[str] = set()
    last = str(messages[-1].get("uuid"))
    while last in by_id and last not in seen:
        seen.add(last)
        path.append(by_id[last])
        last = str(by_id[last].get("parent_message_uuid"))
    return path[::-1]


def _turn(message: Record, origin: str, ledger: Ledger) -> Turn | None:
    role = _ROLES.get(message.get("sender") or "")
    if role is None:
        raise BadRecordError("unknown sender", message.get("sender"))
    texts, thoughts = list[str](), list[str]()
    parts = message.get("content")
    if isinstance(parts, list) and parts:
        for part in map(entry_of, parts):
            if part.get("type") == "text":
                texts.append(text_of(part.get("text")))
            elif part.get("type") == "thinking":
                thoughts.append(text_of(part.get("thinking")))
            else:
                ledger.change("call or answer of a tool left out", f"{origin}: {part.get('type')}")
    else:
        texts.append(text_of(message.get("text") or ""))
    files = [*(message.get("attachments") or ()), *(message.get("files") or ())]
    if files:
        ledger.change("picture, sound or file left out of a message", origin, len(files))
    text = "\n\n".join(text for text in texts if text.strip())
    if not text.strip():
        ledger.change("empty message left out", f"{origin}: {role}")
        return None
    thought = "\n\n".join(thoughts).strip() or None
    return Turn(role, text, time=seconds_of(message.get("created_at")), reasoning=thought if role == "assistant" else None)
