"""Reddit dumps (ndjson, often .zst): submissions and comments of one file, as the best path from the post to a leaf.

At each step the reply with the highest score is taken; deleted posts and bots end a path. Whoever posted is the user, whoever
answers the assistant. Memory holds the file's threads: split larger dumps by month or subreddit, as they are published.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from chatmill.data.conversation import Conversation
from chatmill.data.importers.json_lines import first_object, json_lines
from chatmill.data.importers.messages import ChatMessage, to_conversation
from chatmill.data.importers.raw_file import RawFile
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

MAX_DEPTH = 12
_GONE = ("[deleted]", "[removed]", "")


def recognise(head: bytes, name: str) -> bool:
    """Comments have link_id and parent_id, submissions a subreddit and selftext."""
    first = first_object(head)
    return first is not None and (
        {"link_id", "parent_id", "body"} <= set(first) or {"subreddit", "selftext", "title"} <= set(first)
    )


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """The best path of every thread; a thread whose post is not in the file begins at its top comments."""
    children: dict[str, list[dict[str, Any]]] = {}
    roots: dict[str, dict[str, Any]] = {}
    for number, record in json_lines(file, options.encoding, ledger):
        entry = _entry(record)
        reason = None if entry else "no body"
        if entry and (entry["author"] in ("AutoModerator", "[deleted]") or entry["author"].lower().endswith("bot")):
            reason = "bot or deleted account"
        elif entry and entry["text"].strip() in _GONE:
            reason = "deleted"
        if entry is None or reason is not None:
            ledger.change(f"{reason} left out", f"{file.label}:{number}")
        elif entry["parent"] is None:
            roots[entry["key"]] = entry
        else:
            children.setdefault(entry["parent"], []).append(entry)
    for parent in [key for key in children if key.startswith("t3_") and key not in roots]:
        for top in children.pop(parent):
            roots[top["key"]] = top
    for root in roots.values():
        path = [root]
        while (replies := children.get(path[-1]["key"])) and len(path) < MAX_DEPTH:
            path.append(max(replies, key=lambda e: (e["score"], -e["time"])))
        messages = [ChatMessage(e["author"], e["text"], e["time"], e["key"]) for e in path]
        found = to_conversation(
            messages, source=source, origin=f"{file.label}:{root['key']}", ledger=ledger, assistant=options.assistant,
            meta={"score": path[-1]["score"]},
        )  # fmt: skip
        if found is not None:
            yield found


def _entry(record: dict[str, Any]) -> dict[str, Any] | None:
    if "link_id" in record:
        key, parent, text = f"t1_{record.get('id')}", record.get("parent_id"), record.get("body")
    else:
        key, parent = f"t3_{record.get('id')}", None
        text = f"{record.get('title', '')}\n\n{record.get('selftext') or ''}".strip()
        if record.get("selftext") in ("[deleted]", "[removed]"):
            text = record["selftext"]
    if not isinstance(text, str):
        return None
    return {
        "key": key,
        "parent": parent,
        "author": str(record.get("author") or "[deleted]"),
        "text": html.unescape(text),
        "score": int(record.get("score") or 0),
        "time": float(record.get("created_utc") or 0),
    }
