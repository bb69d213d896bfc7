"""ChatGPT's data export, conversations.json: [{"title", "current_node", "mapping": {id: {message, parent, children}}}, …].

Each conversation is a tree; the path to current_node is what was shown last. Other branches (regenerated replies, edited
messages) are left out and counted. Only what was said to each other is the dialogue: hidden system messages, the model's
thoughts, its calls of tools (a `recipient` other than all) and what the tools answered are not. Marks of citations are taken
out of the texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from ...conversation import Conversation, Role, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..datasets.openai_messages import other_parts
from ..messengers.dated import seconds_of
from ..records import BadRecordError, Record, read_records
from ..unread import Unread
from .branches import shown_branch

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_THOUGHTS = ("thoughts", "reasoning_recap", "user_editable_context", "model_editable_context")
# \ue200cite\ue202turn0search0\ue201, and of earlier years 【12†source】. A mark may carry words: entity names one, url a title.
_MARK = re.compile("[ \u00a0]?\ue200([a-z_]*)((?:\ue202[^\ue200\ue201]*)*)\ue201|[ \u00a0]?【\\d+(?::\\d+)?†[^】\n]{0,200}】")
_STRAY = re.compile("[\ue200-\ue206]")


def recognise(head: bytes, name: str) -> bool:
    """Objects with a mapping of nodes, or the beginning of one."""
    first = first_object(head)
    if first is not None:
        return isinstance(first.get("mapping"), dict)
    return head.lstrip()[:1] in (b"{", b"[") and b'"mapping"' in head[:4000] and b'"children"' in head


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per conversation."""
    reader = partial(_dialogue, Unread(ledger))
    yield from read_records(json_lines(file, options.encoding, ledger), reader, file, source, ledger, "mapping")


def _dialogue(unread: Unread, record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    unread.ledger = ledger
    nodes = record.get("mapping")
    path = shown_branch(nodes, record.get("current_node")) if isinstance(nodes, dict) else []
    if not isinstance(nodes, dict) or not path:
        raise BadRecordError("no path to current_node", record.get("title"))
    spoken = {key for key, node in nodes.items() if _said(node)}
    if aside := len(spoken - set(path)):
        ledger.change("message of another branch left out", f"{origin}: {record.get('title')}", aside)
    turns = [turn for key in path if key in spoken and (turn := _turn(nodes[key]["message"], origin, unread)) is not None]
    return turns, {"title": str(record.get("title") or "")}


def _said(node: Any) -> bool:
    """Is there a message that was shown?"""
    message = node.get("message") if isinstance(node, dict) else None
    if not isinstance(message, dict):
        return False
    hidden = (message.get("metadata") or {}).get("is_visually_hidden_from_conversation")
    content = message.get("content") or {}
    empty_system = (message.get("author") or {}).get("role") == "system" and not "".join(map(str, content.get("parts") or []))
    return not hidden and not empty_system


def _turn(message: dict[str, Any], origin: str, unread: Unread) -> Turn | None:
    ledger = unread.ledger
    content, role = message.get("content") or {}, (message.get("author") or {}).get("role")
    kind = content.get("content_type")
    parts = content.get("parts") or []
    if role == "tool" or message.get("recipient") not in (None, "", "all"):
        ledger.change("call or answer of a tool left out", f"{origin}: {role} to {message.get('recipient')}")
        return None
    if kind in _THOUGHTS or role not in _ROLES:
        ledger.change("thoughts and settings left out", f"{origin}: {kind} of {role}")
        return None
    pictures = [part for part in parts if isinstance(part, dict) and not isinstance(part.get("text"), str)]
    if pictures:
        ledger.change("picture, sound or file left out of a message", f"{origin}: {other_parts(parts)}", len(pictures))
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts if isinstance(part, str | dict)]
    text = "\n".join(text for text in texts if text) or str(content.get("text") or content.get("result") or "")
    if not text.strip():
        if not pictures:
            ledger.change("empty message left out", f"{origin}: {kind} of {role}")
        return None
    if not unread.is_known(message):
        unread.note(message, texts or [text], origin)
    if role == "assistant":
        plain = without_citations(text)
        if plain != text:
            ledger.change("marks of citations taken out", f"{origin}: {text}")
        text = plain
        if not text.strip():
            return None
    return Turn(_ROLES[role], text, time=seconds_of(message.get("create_time")))


def without_citations(text: str) -> str:
    """A reply without the marks that the page shows as links; the words that a mark carries stay."""
    return _STRAY.sub("", _MARK.sub(_words, text))


def _words(found: re.Match[str]) -> str:
    kind, fields = found[1], (found[2] or "").split("\ue202")[1:]
    if not fields or kind not in ("entity", "url"):
        return ""
    word = fields[0]
    if kind == "entity":  # ["city","Paris","…"]
        try:
            names = json.loads(word)
            word = str(names[1])
        except (ValueError, TypeError, IndexError, KeyError, RecursionError):
            return ""
    return found[0][: len(found[0]) - len(found[0].lstrip(" \u00a0"))] + word
