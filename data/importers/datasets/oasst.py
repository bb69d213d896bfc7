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
    for _, record in json_lines(file, options.encoding, ledger):
        if "prompt" in record:
            yield record["message_tree_id"], record["prompt"]
            continue
        if tree and tree[0]["message_tree_id"] != record["message_tree_id"]:
            yield from _roots(tree, file, ledger)
            tree = []
        tree.append(record)
    if tree:
        yield from _roots(tree, file, ledger)


def _roots(messages: list[dict[str, Any]], file: RawFile, ledger: Ledger) -> Iterator[tuple[str, dict[str, Any]]]:
    nodes = {m["message_id"]: {**m, "replies": []} for m in messages}
    roots = []
    for node in nodes.values():
        parent = nodes.get(node.get("parent_id") or "")
        if parent is not None:
            parent["replies"].append(node)
        elif node.get("parent_id"):
            ledger.change("message without its parent left out", f"{file.label}:{node['message_id']}")
        else:
            roots.append(node)
    for root in roots:
        yield root["message_tree_id"], root


def _paths(root: dict[str, Any], tree: str, file: RawFile, source: str, ledger: Ledger) -> Iterator[Conversation]:
    taught: set[str] = set()
    stack: list[list[dict[str, Any]]] = [[root]]
    while stack:
        path = stack.pop()
        if path[-1].get("deleted"):
            ledger.change("deleted message left out", f"{file.label}:{path[-1].get('message_id')}")
            continue
        replies = [reply for reply in path[-1].get("replies") or [] if not reply.get("deleted")]
        if replies:
            ranked = sorted(replies, key=lambda m: (m.get("rank") is None, m.get("rank") or 0))
            stack += [[*path, reply] for reply in reversed(ranked)]
            continue
        if path[-1].get("role") != "assistant":
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
