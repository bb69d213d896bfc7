"""Conversations stored as trees of messages, {id: {parent, children, message}}: the branch that was on the screen last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shown_branch(nodes: Mapping[str, Any], last: Any) -> list[str]:
    """Ids from the root to the node `last`; without one, along the newest children. Nodes that go in circles end it."""
    if last not in nodes:
        last = next((key for key, node in nodes.items() if not node.get("parent")), None)
        seen = {last}
        while last in nodes and (children := nodes[last].get("children")) and children[-1] not in seen:
            last = children[-1]
            seen.add(last)
    path: list[str] = []
    while last in nodes and last not in path:
        path.append(last)
        last = nodes[last].get("parent")
    return path[::-1]
