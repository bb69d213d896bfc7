"""Which samples stay, under which uid, and on which side of the split: decided once, and never again for those in a data set.

    replaced = place(table, recipe.dedup, recipe.split)                    # a build: every row is new
    replaced = place(table, recipe.dedup, recipe.split, known=len(old))    # rows [0, known) are in the set already

Samples that are there keep reason, uid and side; what is new follows them. It is dropped where it is there already. It goes
to the side of what it belongs with (a thread, duplicates, near duplicates and, if asked for, an author); where that is both
sides, it is dropped, too, and counted. What belongs with nothing in the set goes where a build of it alone would put it, by
the hash of its group (data/samples/split.py). Only a longer export of a conversation replaces one that is there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

from ..recipe import DedupSection, SplitSection
from .dedup import CONTAMINATED, JOINS, SUPERSEDED, UnionFind, deduplicate
from .identity import resolve
from .near_duplicates import near_pairs
from .split import assign, crossing, group, group_keys, join
from .table import NEITHER, SampleTable

Pairs = NDArray[np.int64]


def place(table: SampleTable, dedup: DedupSection, split: SplitSection, known: int = 0) -> dict[int, int]:
    """Fill reason, copy and side of the rows from `known` on. Returns {row in the set: new row that replaces it}.

    A replaced row gets the reason SUPERSEDED. Raises ConfigError where two rows of the set turn out to leak.
    """
    near = dedup.near
    pairs = near_pairs(table.signature, near.threshold) if near else np.zeros((0, 2), np.int64)
    reason, cluster = deduplicate(table.exact, dedup.exact, pairs if near else None, near is not None and near.drop)
    reason[table.contaminated] = CONTAMINATED
    reason[:known] = table.reason[:known]
    stays, table.copy = resolve(table.uid, table.size, reason == 0, table.copy[:known])
    replaced = _replaced(table, np.flatnonzero((reason == 0) & ~stays & (np.arange(len(table)) < known)), stays)
    reason[(reason == 0) & ~stays] = SUPERSEDED
    table.reason = reason
    if known == 0:
        _divide(table, cluster, dedup, split)
        return {}
    joins = _follow(table, pairs, dedup, split, known)
    for old, new in list(replaced.items()):
        if joins[new]:  # what it would have replaced stays
            table.reason[old] = 0
            del replaced[old]
    table.reason[joins & (table.reason == 0)] = JOINS
    return replaced


def _replaced(table: SampleTable, rows: NDArray[np.int64], stays: NDArray[np.bool_]) -> dict[int, int]:
    """Each of the rows, and the row of its uid that stays in its place."""
    wanted = set(rows.tolist())
    by_uid = {bytes(table.uid[i]): int(i) for i in np.flatnonzero(stays & (table.size > 0)) if wanted}
    return {i: by_uid[bytes(table.uid[i])] for i in sorted(wanted)}


def _divide(table: SampleTable, cluster: NDArray[np.int64], dedup: DedupSection, split: SplitSection) -> None:
    """The sides of a set of which nothing is decided yet."""
    keep = table.reason == 0
    authors = table.author_lists() if split.by_author else None
    while True:
        groups = group(cluster, table.thread, authors)
        table.side = assign(group_keys(groups, table.thread, table.time, keep), split).astype(np.uint8)
        if dedup.near is None:
            return
        before = cluster
        side = np.where(keep, table.side, np.uint8(NEITHER))
        cluster = join(cluster, crossing(table.signature, side, dedup.near.threshold))
        if np.array_equal(cluster, before):
            return


def _follow(table: SampleTable, pairs: Pairs, dedup: DedupSection, split: SplitSection, known: int) -> NDArray[np.bool_]:
    """Fill the sides of the rows from `known` on; (N,) True for those that would join both sides."""
    joins = np.zeros(len(table), dtype=bool)
    while True:
        joins[known:] = _join_new(table, pairs, split, known)
        if dedup.near is None:
            return joins
        side = np.where((table.reason == 0) & ~joins, table.side, np.uint8(NEITHER))
        found = crossing(table.signature, side, dedup.near.threshold)
        if not len(found):
            return joins
        if (found < known).all(axis=1).any():
            raise ConfigError(
                "near duplicates in the data set, hidden by others until now, lie on both sides of the split.\n"
                "Build the data set again: chatmill data build RECIPE"
            )
        pairs = np.concatenate([pairs, found])


def _join_new(table: SampleTable, pairs: Pairs, split: SplitSection, known: int) -> NDArray[np.bool_]:
    """One round of _follow, over the new rows. The two sides of the set are two nodes: what is there is decided."""
    n = len(table) - known
    sets, joins, sides = UnionFind(n + 2), np.zeros(n, dtype=bool), (n, n + 1)
    keys = _keys(table, split.by_author)
    holders = [_holders(rows_of, table.side, known, n) for rows_of in keys]  # key -> a node that has it
    near = _near_links(table, pairs, known)
    units: dict[int, list[int]] = {}
    for i, thread in enumerate(table.thread[known:].tolist()):
        units.setdefault(thread, []).append(i)
    placed = np.zeros(n + 2, dtype=bool)
    placed[list(sides)] = True
    for members in units.values():  # a thread stays together, or goes as a whole
        own = [{key for i in members for key in rows_of[known + i]} for rows_of in keys]
        linked = [holder[key] for holder, names in zip(holders, own, strict=True) for key in names if key in holder]
        linked += [node for i in members for node in near.get(i, ()) if placed[node]]
        if {sets.find(side) for side in sides} <= {sets.find(node) for node in linked}:
            joins[members] = True
            continue
        for node in (*members, *linked):
            sets.union(members[0], node)
        placed[members] = True
        for holder, names in zip(holders, own, strict=True):
            holder.update(dict.fromkeys(names, members[0]))
    roots = sets.roots()
    groups, keep = roots[:n], (table.reason[known:] == 0) & ~joins
    drawn = assign(group_keys(groups, table.thread[known:], table.time[known:], keep), split).astype(np.uint8)
    drawn[groups == roots[sides[0]]] = 0
    drawn[groups == roots[sides[1]]] = 1
    drawn[joins] = NEITHER
    table.side[known:] = drawn
    return joins


def _keys(table: SampleTable, by_author: bool) -> list[list[list[int]]]:
    """What ties samples together, per kind the keys of each row: equal texts, threads, authors."""
    keys = [[[key] for key in column.tolist()] for column in (table.exact, table.thread)]
    return [*keys, table.author_lists()] if by_author else keys


def _holders(keys: list[list[int]], side: NDArray[np.uint8], known: int, n: int) -> dict[int, int]:
    """The node of the side that has each key which the new rows have, too."""
    wanted = {key for names in keys[known:] for key in names}
    rows = zip(keys[:known], side[:known].tolist(), strict=True)
    return {key: n + chosen for names, chosen in rows if chosen != NEITHER for key in names if key in wanted}


def _near_links(table: SampleTable, pairs: Pairs, known: int) -> dict[int, list[int]]:
    """The nodes that are near duplicates of a new row."""
    n, links = len(table) - known, dict[int, list[int]]()
    for a, b in pairs[pairs[:, 1] >= known].tolist():  # a < b
        if a >= known:
            links.setdefault(a - known, []).append(b - known)
            links.setdefault(b - known, []).append(a - known)
        elif table.side[a] != NEITHER:
            links.setdefault(b - known, []).append(n + int(table.side[a]))
    return links
