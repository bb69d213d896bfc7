"""OpenAssistant: message trees (`.trees.jsonl`) or flat messages (`.messages.jsonl`), as paths from root to leaf.

A tree gives one dialogue per leaf, children in the order of their rank. A reply that was already in an
earlier path of the same tree carries no loss, so that a trunk shared by ten leaves is not learned ten times. Deleted messages
end their branch. meta["rank"] of the last reply and meta["thread"] (the tree) are kept: all paths of a tree stay on one side
of the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..records import MALFORMED, BadRecordError, entry_of, text_of, why_bad
from ..unread import Unread


def recognise(head: bytes, name: str) -> bool:
    """Trees have message_tree_id and prompt, messages have message_id and parent_id."""
    first = first_object(head)
    if first is None:
        return b'"message_tree_id"' in head[:2000]
    return "message_tree_id" in first and ("prompt" in first or "message_id" in first)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All root-to-leaf paths."""
    for tree, root in trees(file, options, ledger):
        yield from _paths(root, tree, file, source, ledger)


def trees(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[tuple[str, dict[str, Any]]]:
    """(tree id, root message with nested replies). Flat files list a tree's messages together: one tree is in memory."""
    tree: list[dict[str, Any]] = []
    unread = Unread(ledger)
    for number, record in json_lines(file, options.encoding, ledger):
        where = f"{file.label}:{number}"
        if "prompt" in record:
            root = _node(record["prompt"], where, ledger, unread)
            if root is not None:
                yield str(record.get("message_tree_id")), root
            continue
        node = _node({**record, "replies": []}, where, ledger, unread)
        if node is None:
            continue
        if tree and tree[0]["message_tree_id"] != node["message_tree_id"]:
            yield from _roots(tree, file, ledger)
            tree = []
        tree.append(node)
    if tree:
        yield from _roots(tree, file, ledger)


def _node(value: Any, where: str, ledger: Ledger, unread: Unread) -> dict[str, Any] | None:
    """A message and its replies with all fields as they must be; what is not so is left out and counted, with its replies."""
    try:
        node = entry_of(value)
        rank, replies = node.get("rank"), node.get("replies") or []
        if not isinstance(replies, list):
            raise BadRecordError("replies are not a list", type(replies).__name__)
        fields = {
            "message_id": text_of(node["message_id"], "message_id"), "text": text_of(node["text"]), "role": node.get("role"),
            "rank": None if rank is None else float(rank), "deleted": bool(node.get("deleted")), "lang": node.get("lang"),
            "message_tree_id": str(node.get("message_tree_id")), "parent_id": node.get("parent_id"),
        }  # fmt: skip
        if fields["role"] not in ("prompter", "assistant"):
            raise BadRecordError("unknown role", fields["role"])
        if fields["parent_id"] is not None:
            text_of(fields["parent_id"], "parent_id")
        text_of(node["text"])
        if not unread.is_known(node):
            unread.note({**node, "replies": None}, (node["text"],), where)
        found = [reply for item in replies if (reply := _node(item, where, ledger, unread)) is not None]
        return fields | {"replies": found}
    except MALFORMED as error:
        reason, detail = why_bad(error)
        ledger.change(f"{reason}: message left out", f"{where}: {detail}", _count(value))
        return None


def _count(value: Any) -> int:
    """Messages of a tree, whatever its form."""
    count, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        count += 1
        replies = item.get("replies") if isinstance(item, dict) else None
        waiting += replies if isinstance(replies, list) else []
    return count


def _roots(messages: list[dict[str, Any]], file: RawFile, ledger: Ledger) -> Iterator[tuple[str, dict[str, Any]]]:
    nodes = {m["message_id"]: {**m, "replies": []} for m in messages}
    if twice := len(messages) - len(nodes):
        ledger.change("message that occurs twice left out", f"{file.label}:{messages[0]['message_tree_id']}", twice)
    roots = []
    for node in nodes.values():
        parent = nodes.get(node.get("parent_id") or "")
        if parent is not None:
            parent["replies"].append(node)
        elif not node.get("parent_id"):
            roots.append(node)
    reached = sum(_count(root) for root in roots)
    lost = [node for node in nodes.values() if node.get("parent_id") and node["parent_id"] not in nodes]
    for node in lost:  # all replies below are known now
        ledger.change("message without its parent left out", f"{file.label}:{node['message_id']}", _count(node))
    orphans = sum(map(_count, lost))
    if circles := len(nodes) - reached - orphans:
        ledger.change("message that answers itself in a circle left out", f"{file.label}:{messages[0]['message_id']}", circles)
    for root in roots:
        yield root["message_tree_id"], root


def _paths(root: dict[str, Any], tree: str, file: RawFile, source: str, ledger: Ledger) -> Iterator[Conversation]:
    taught: set[str] = set()
    stack: list[list[dict[str, Any]]] = [[root]]
    while stack:
        path = stack.pop()
        if path[-1].get("deleted"):
            ledger.change("deleted message left out", f"{file.label}:{path[-1].get('message_id')}", _count(path[-1]))
            continue
        replies = [reply for reply in path[-1].get("replies") or [] if not reply.get("deleted")]
        if gone := [reply for reply in path[-1]["replies"] if reply["deleted"]]:
            ledger.change("deleted message left out", f"{file.label}:{gone[0]['message_id']}", sum(map(_count, gone)))
        if replies:
            ranked = sorted(replies, key=lambda m: (m.get("rank") is None, m.get("rank") or 0))
            stack += [[*path, reply] for reply in reversed(ranked)]
            continue
        if path[-1].get("role") != "assistant":
            ledger.change("last message without an answer left out", f"{file.label}:{path[-1]['message_id']}")
            path = path[:-1]
        if not path or path[-1]["message_id"] in taught:
            ledger.drop("prompt without an answer", f"{file.label}:{tree}")
            continue
        turns = []
        for message in path:
            role = "assistant" if message["role"] == "assistant" else "user"
            turns.append(
                Turn("assistant" if role == "assistant" else "user", message["text"], loss=message["message_id"] not in taught)
            )
        taught.update(m["message_id"] for m in path if m["role"] == "assistant")
        leaf = path[-1]
        origin = f"{file.label}:{leaf['message_id']}"
        meta = {"thread": tree, "rank": leaf.get("rank"), "lang": root.get("lang")}
        ledger.keep()
        yield Conversation(
            make_uid(source, origin), tuple(turns), source, origin, {k: v for k, v in meta.items() if v is not None}
        )
