"""Reddit dumps (ndjson, often .zst): submissions and comments of one file, as the best path from the post to a leaf.

At each step the reply with the highest score is taken; deleted posts and bots end a path. The author of the post is the user,
whoever answers is the assistant. The file's threads are kept in a table on disk (spill.py), because a reply may come anywhere
after its parent.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...raw.spill import Spill, key, packed, unpacked
from ...recipe import SourceSection
from ..messages import ChatMessage, to_conversation
from ..messengers.dated import seconds_of
from ..records import MALFORMED, text_of
from ..unread import Unread

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
    with Spill("CREATE TABLE posts (key, entry)", "CREATE TABLE comments (key, parent, score, time, entry)") as db:
        unread = Unread(ledger)
        for number, record in json_lines(file, options.encoding, ledger):
            try:
                entry = _entry(record)
            except MALFORMED as error:
                ledger.change("bad record left out", f"{file.label}:{number}: {error}")
                continue
            reason = None if entry else "no body"
            if entry and (entry["author"] in ("AutoModerator", "[deleted]") or entry["author"].lower().endswith("bot")):
                reason = "bot or deleted account"
            elif entry and entry["text"].strip() in _GONE:
                reason = "deleted"
            if entry is None or reason is not None:
                ledger.change(f"{reason} left out", f"{file.label}:{number}")
                continue
            if not unread.is_known(record):
                unread.note(record, (entry["text"],), f"{file.label}:{number}")
            stored = packed(*(entry[name] for name in ("key", "author", "text", "score", "time")))
            if entry["parent"] is None:
                db.execute("INSERT INTO posts VALUES (?, ?)", (key(entry["key"]), stored))
            else:
                row = (key(entry["key"]), key(entry["parent"]), entry["score"], entry["time"], stored)
                db.execute("INSERT INTO comments VALUES (?, ?, ?, ?, ?)", row)
        db.execute("CREATE INDEX by_key ON posts (key)")
        # The rowid is the position in the file: the first of equals wins.
        db.execute("CREATE INDEX best ON comments (parent, score DESC, time)")
        found = db.one("SELECT COUNT(*) FROM comments")
        beside = found[0] if found else 0
        for statement, roots in ((_POSTS, 1), (_TOPS, 0)):
            for (root,) in db.execute(statement):
                path = _path(db, root)
                beside -= len(path) - roots
                messages = [ChatMessage(author, text, time, name) for name, author, text, _, time in path]
                origin, meta = f"{file.label}:{path[0][0]}", {"score": path[-1][3]}
                chat = to_conversation(
                    messages, source=source, origin=origin, ledger=ledger, assistant=options.assistant, meta=meta
                )
                if chat is not None:
                    yield chat
        if beside > 0:
            ledger.change("comment beside the best path left out", n=beside)


# Posts that occur twice, and top comments without their post: the latest version, at the position of the first.
_POSTS = """
    SELECT posts.entry FROM (SELECT MIN(rowid) AS first, MAX(rowid) AS last FROM posts GROUP BY key) AS place
    JOIN posts ON posts.rowid = place.last ORDER BY place.first"""
_TOPS = """
    SELECT comments.entry FROM (
        SELECT MIN(started) AS started, MIN(tops.rowid) AS first, MAX(tops.rowid) AS last FROM comments AS tops JOIN (
            SELECT parent, MIN(rowid) AS started FROM comments
            WHERE parent GLOB 't3_*' AND parent NOT IN (SELECT key FROM posts) GROUP BY parent
        ) AS orphans ON orphans.parent = tops.parent GROUP BY tops.key
    ) AS place JOIN comments ON comments.rowid = place.last ORDER BY place.started, place.first"""


def _path(db: Spill, root: str) -> list[list[Any]]:
    """[key, author, text, score, time] of a post or top comment, then of its best reply, and so on."""
    path = [unpacked(root)]
    while len(path) < MAX_DEPTH:
        reply = db.one(
            "SELECT entry FROM comments WHERE parent = ? ORDER BY score DESC, time, rowid LIMIT 1", (key(path[-1][0]),)
        )
        if reply is None:
            break
        path.append(unpacked(reply[0]))
    return path


def _entry(record: dict[str, Any]) -> dict[str, Any] | None:
    if "link_id" in record:
        name, text = f"t1_{record.get('id')}", record.get("body")
        parent = str(record.get("parent_id"))
    else:
        name, parent = f"t3_{record.get('id')}", None
        text = f"{text_of(record.get('title') or '')}\n\n{text_of(record.get('selftext') or '')}".strip()
        if record.get("selftext") in ("[deleted]", "[removed]"):
            text = record["selftext"]
    if not isinstance(text, str):
        return None
    return {
        "key": name,
        "parent": parent,
        "author": str(record.get("author") or "[deleted]"),
        "text": html.unescape(text),
        "score": max(-(2**62), min(2**62, int(record.get("score") or 0))),
        "time": seconds_of(record.get("created_utc")) or 0.0,
    }
