"""OpenAssistant trees as preference pairs: of the ranked replies to one message, the best against the worst.

The pairs of a tree share meta["thread"], so they stay on one side of the split. Deleted and unranked replies are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Turn, make_uid
from ...ledger import Ledger
from ...preference import REJECTED
from ...raw.files import RawFile
from ...recipe import SourceSection
from .oasst import trees


def recognise(head: bytes, name: str) -> bool:
    """Never detected: the importer oasst reads the same files as ordinary dialogues."""
    return False


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One pair for every message with at least two ranked replies."""
    for tree, root in trees(file, options, ledger):
        stack: list[list[dict[str, Any]]] = [[root]]
        found = 0
        while stack:
            path = stack.pop()
            if path[-1].get("deleted"):
                continue
            replies = [r for r in path[-1].get("replies") or [] if not r.get("deleted")]
            stack += [[*path, r] for r in reversed(replies)]
            ranked = sorted((r for r in replies if r.get("rank") is not None), key=lambda r: r["rank"])
            if path[-1].get("role") == "assistant" or len(ranked) < 2 or ranked[0]["rank"] == ranked[-1]["rank"]:
                continue
            best, worst = ranked[0], ranked[-1]
            turns = tuple(Turn("assistant" if m["role"] == "assistant" else "user", m["text"]) for m in (*path, best))
            origin = f"{file.label}:{best['message_id']}>{worst['message_id']}"
            meta = {"thread": tree, "lang": root.get("lang"), REJECTED: worst["text"]}
            ledger.keep()
            found += 1
            yield Conversation(
                make_uid(source, origin), turns, source, origin, {k: v for k, v in meta.items() if v is not None}
            )
        if not found:
            ledger.drop("tree without two ranked replies to one message", f"{file.label}:{tree}")
