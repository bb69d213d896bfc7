"""Splits train and validation after clustering, so that nothing leaks, and writes the certificate that says so.

    side = assign(cluster_keys, SplitSection())        # True: validation
    certificate(train_facts, validation_facts)

The side of a sample depends only on the hash of its group's key and on the seed; the key is the thread of the group's earliest
sample, and a thread is named by how its conversation begins (data/samples/identity.py). So new data and new names of files move
no old sample to the other side, and all samples of a thread, of a duplicate cluster and (if asked for) of an author's
connected chats stay together. Only where new data joins two groups, as a shared author does, may one of them move.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..conversation import Conversation
from ..recipe import SplitSection
from .dedup import UnionFind, text_hash
from .near_duplicates import PERMUTATIONS, dialogue_text, near_pairs, signatures


def key_hash(key: str) -> int:
    """xxh3-64 of a thread or author name."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass"))


def thread_key(conversation: Conversation) -> str:
    """The conversation a sample was cut from."""
    return str(conversation.meta.get("thread", conversation.uid))


def group(
    cluster: NDArray[np.int64], threads: NDArray[np.uint64], authors: Sequence[Sequence[int]] | None
) -> NDArray[np.int64]:
    """Groups that must stay on one side: joined duplicate clusters, threads and, if given, authors. (N,) smallest member."""
    sets = UnionFind(len(cluster))
    for i, root in enumerate(cluster.tolist()):
        sets.union(i, root)
    sets.join_equal(threads)
    if authors is not None:
        first: dict[int, int] = {}
        for i, names in enumerate(authors):
            for name in names:
                sets.union(i, first.setdefault(name, i))
    return sets.roots()


def crossing(signature: NDArray[np.uint32], side: NDArray[np.uint8], threshold: float) -> NDArray[np.int64]:
    """(k, 2) near duplicates of which one trains (side 0) and one validates (side 1). Where a bucket is large, what was dropped
    may have stood between two of them; the split then joins them, too."""
    rows = np.flatnonzero(side < 2)
    pairs = rows[near_pairs(signature[rows], threshold)]
    return np.asarray(pairs[side[pairs[:, 0]] != side[pairs[:, 1]]])


def join(cluster: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The clusters (N,), with those of each pair made one."""
    sets = UnionFind(len(cluster))
    for i, root in enumerate(cluster.tolist()):
        sets.union(i, root)
    for i, j in pairs.tolist():
        sets.union(i, j)
    return sets.roots()


def group_keys(
    groups: NDArray[np.int64], threads: NDArray[np.uint64], times: NDArray[np.float64], keep: NDArray[np.bool_]
) -> NDArray[np.uint64]:
    """(N,) the key of each sample's group: the thread of its earliest sample that stays; without times, its smallest thread.

    times: seconds since 1970, inf where unknown. What is dropped as a copy moves no group, and neither do later messages.
    """
    keys = np.full(len(groups), np.iinfo(np.uint64).max, dtype=np.uint64)
    latest_first = np.lexsort((threads, times))[::-1]
    latest_first = latest_first[keep[latest_first]]
    keys[groups[latest_first]] = threads[latest_first]  # the earliest is written last
    return np.asarray(keys[groups])


def assign(group_keys: NDArray[np.uint64], config: SplitSection) -> NDArray[np.bool_]:
    """(N,) True for validation. group_keys: one hash per sample, equal within a group."""
    unique, inverse = np.unique(group_keys, return_inverse=True)
    limit = int(config.validation * 2.0**64)
    side = np.array(
        [xxhash.xxh3_64_intdigest(int(key).to_bytes(8, "little"), seed=config.seed) < limit for key in unique], dtype=bool
    )
    return side[inverse]


class Facts:
    """What the sides must not share, as 64-bit hashes: 8 bytes each, whatever the length of the texts."""

    def __init__(self, near: bool = False) -> None:
        self.near, self._texts = near, list[str]()
        self._signatures: list[NDArray[np.uint32]] = []
        self.hashes: dict[str, array[int]] = {
            name: array("Q") for name in ("samples", "conversations", "exact_texts", "authors")
        }

    def add(self, conversation: Conversation) -> None:
        """Note one sample."""
        self.hashes["samples"].append(key_hash(conversation.uid))
        self.hashes["conversations"].append(key_hash(thread_key(conversation)))
        self.hashes["exact_texts"].append(text_hash(conversation))
        self.hashes["authors"].extend(author_hashes(conversation))
        if self.near:
            self._texts.append(dialogue_text(conversation))
            if len(self._texts) >= 1000:
                self._sign()

    def add_signatures(self, rows: NDArray[np.uint32]) -> None:
        """MinHash signatures computed elsewhere."""
        self._signatures.append(rows)

    def signatures(self) -> NDArray[np.uint32]:
        """All signatures, (n, 128)."""
        self._sign()
        return np.concatenate([np.zeros((0, PERMUTATIONS), dtype=np.uint32), *self._signatures])

    def _sign(self) -> None:
        if self._texts:
            self._signatures.append(signatures(self._texts))
            self._texts = []


def author_hashes(conversation: Conversation) -> list[int]:
    """key_hash of everybody who speaks, where the importer knows."""
    return [key_hash(str(author)) for author in conversation.meta.get("authors", ())]


def certificate(train: Facts, validation: Facts, by_author: bool, near: float | None = None) -> dict[str, Any]:
    """Counts of what the two sides share. `valid` if all that were asked for are 0. near: threshold for near duplicates.

    not_asked: what the recipe did not ask to keep apart. Shared authors are counted all the same; near duplicates, which take
    signatures of all texts, are not looked for.
    """
    shared = {
        name: len(np.intersect1d(np.array(values, dtype=np.uint64), np.array(validation.hashes[name], dtype=np.uint64)))
        for name, values in train.hashes.items()
    }
    asked = [name for name in shared if name != "authors" or by_author]
    if near is not None:
        left, right = train.signatures(), validation.signatures()
        pairs = near_pairs(np.concatenate([left, right]), near)
        shared["near_duplicates"] = int(np.sum((pairs[:, 0] < len(left)) & (pairs[:, 1] >= len(left))))
        asked.append("near_duplicates")
    return {
        "shared": shared,
        "asked": asked,
        "not_asked": [name for name in ("near_duplicates", "authors") if name not in asked],
        "near": near,
        "valid": all(shared[name] == 0 for name in asked),
    }


def in_words(proof: Mapping[str, Any]) -> str:
    """What a certificate counted, and what it did not look for; `0 samples, 0 conversations, …; not looked for: …`."""
    counted = ", ".join(f"{proof['shared'][name]} {name.replace('_', ' ')}" for name in proof["asked"])
    left = []
    for name in proof.get("not_asked", ()):
        known = proof["shared"].get(name)
        left.append(name.replace("_", " ") + ("" if known is None else f" ({known} shared)"))
    return counted + (f"; not kept apart: {', '.join(left)}" if left else "")
