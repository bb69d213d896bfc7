"""ChatGPT's data export, conversations.json: [{"title", "current_node", "mapping": {id: {message, parent, children}}}, …].

Each conversation is a tree; the path to current_node is what was shown last. Other branches (regenerated replies, edited
messages) are left out and counted. Hidden system messages and the model's own thoughts are not part of the dialogue.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Role, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..datasets.openai_messages import other_parts

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_THOUGHTS = ("thoughts", "reasoning_recap", "user_editable_context", "model_editable_context")


def recognise(head: bytes, name: str) -> bool:
    """Objects with a mapping of nodes, or the beginning of one."""
    first = first_object(head)
    if first is not None:
        return isinstance(first.get("mapping"), dict)
    return head.lstrip()[:1] in (b"{", b"[") and b'"mapping"' in head[:4000] and b'"children"' in head


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per conversation."""
    for number, record in json_lines(file, options.encoding, ledger):
        origin = f"{file.label}:{number}"
        nodes = record.get("mapping")
        path = _path(nodes, record.get("current_node")) if isinstance(nodes, dict) else []
        if not isinstance(nodes, dict) or not path:
            ledger.drop("no path to current_node", f"{origin}: {record.get('title')}")
            continue
        spoken = {key for key, node in nodes.items() if _said(node)}
        if aside := len(spoken - set(path)):
            ledger.change("message of another branch left out", f"{origin}: {record.get('title')}", aside)
        turns = [turn for key in path if key in spoken and (turn := _turn(nodes[key]["message"], origin, ledger)) is not None]
        ledger.keep()
        yield Conversation(make_uid(source, origin), tuple(turns), source, origin, {"title": str(record.get("title") or "")})


def _path(nodes: dict[str, Any], last: Any) -> list[str]:
    """Ids from the root to the node `last`; without one, along the newest children."""
    if last not in nodes:
        last = next((key for key, node in nodes.items() if not node.get("parent")), None)
        while last in nodes and nodes[last].get("children"):
            last = nodes[last]["children"][-1]
    path: list[str] = []
    while last in nodes and last not in path:
        path.append(last)
        last = nodes[last].get("parent")
    return path[::-1]


def _said(node: Any) -> bool:
    """Is there a message that was shown?"""
    message = node.get("message") if isinstance(node, dict) else None
    if not isinstance(message, dict):
        return False
    hidden = (message.get("metadata") or {}).get("is_visually_hidden_from_conversation")
    content = message.get("content") or {}
    empty_system = (message.get("author") or {}).get("role") == "system" and not "".join(map(str, content.get("parts") or []))
    return not hidden and not empty_system


def _turn(message: dict[str, Any], origin: str, ledger: Ledger) -> Turn | None:
    content, role = message.get("content") or {}, (message.get("author") or {}).get("role")
    kind = content.get("content_type")
    parts = content.get("parts") or []
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
    time = message.get("create_time")
    return Turn(_ROLES[role], text, time=float(time) if isinstance(time, int | float) else None)
