"""Duplicates: which samples are equal, and which of them stays.

    keep, cluster = deduplicate(exact_hashes, config)

Works on one 64-bit hash per sample, not on texts: 16 bytes per sample in memory whatever its length.
Exact means equal roles and contents, except for case, Unicode compatibility form and whitespace.
"""

from __future__ import annotations

import unicodedata

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..conversation import Conversation
from ..preference import REJECTED


def canonical(text: str) -> str:
    """The form in which two texts count as equal."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def text_hash(conversation: Conversation) -> int:
    """xxh3-64 over roles and canonical contents, system turns left out (the same prompt heads thousands of dialogues)."""
    parts = [f"{turn.role}\0{canonical(turn.content)}" for turn in conversation.turns if turn.role != "system"]
    if REJECTED in conversation.meta:
        parts.append(f"{REJECTED}\0{canonical(conversation.meta[REJECTED])}")
    return xxhash.xxh3_64_intdigest("\1".join(parts).encode("utf-8", "surrogatepass"))


class UnionFind:
    """Disjoint sets over 0 … n-1; the root of a set is its smallest member, whatever the order of the unions."""

    def __init__(self, n: int) -> None:
        self.parent: list[int] = list(range(n))

    def find(self, i: int) -> int:
        """Smallest member of i's set."""
        root = i
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[i] != root:
            self.parent[i], i = root, self.parent[i]
        return root

    def union(self, i: int, j: int) -> None:
        """Make one set of the two."""
        a, b = self.find(i), self.find(j)
        if a != b:
            self.parent[max(a, b)] = min(a, b)

    def join_equal(self, keys: NDArray[np.uint64]) -> None:
        """Union all positions that hold the same key."""
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        for k in same.tolist():
            self.union(int(order[k]), int(order[k + 1]))

    def roots(self) -> NDArray[np.int64]:
        """find(i) of every i."""
        return np.array([self.find(i) for i in range(len(self.parent))], dtype=np.int64)


EXACT, NEAR, CONTAMINATED, SUPERSEDED, JOINS, REFUSED = 1, 2, 3, 4, 5, 6
REASONS = {
    EXACT: "exact duplicate",
    NEAR: "near duplicate",
    CONTAMINATED: "shares text with an evaluation set",
    SUPERSEDED: "shorter export of a conversation that is there",
    JOINS: "belongs with dialogues of both sides of the split",
    REFUSED: "refused by the tokenizer or the chat template",
}


def deduplicate(
    exact: NDArray[np.uint64], drop_exact: bool, near: NDArray[np.int64] | None = None, drop_near: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(reason (N,), cluster (N,)). reason: 0 stays, EXACT, NEAR. A cluster is named by its first sample: that one stays.

    near: pairs (k, 2) of near duplicates; of their clusters, too, only the first stays if drop_near.
    """
    sets = UnionFind(len(exact))
    sets.join_equal(exact)
    same = sets.roots()
    reason = np.zeros(len(exact), dtype=np.uint8)
    first = np.arange(len(exact))
    if near is not None:
        for i, j in near.tolist():
            sets.union(i, j)
        if drop_near:
            reason[sets.roots() != first] = NEAR
    if drop_exact:
        reason[same != first] = EXACT
    return reason, sets.roots()
