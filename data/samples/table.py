"""What a data set knows of every sample that it has met, kept or not: hashes, sizes, times, and what became of it.

    table = SampleTable.from_arrays(load_arrays(folder / "samples.npz")).followed_by(SampleTable.of(parts, near=True))

A row per sample, in the order in which they came. It is what duplicates, sides and the certificate are decided by, so that
later exports can be added without reading the earlier ones again (data/pipeline/collect.py). About 600 bytes per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .near_duplicates import PERMUTATIONS

NEITHER = 2  # as a side: of no side, because it would join both
_KINDS: dict[str, Any] = {
    "uid": "S32",
    "size": np.int64,
    "time": np.float64,
    "exact": np.uint64,
    "thread": np.uint64,
    "author_counts": np.int64,
    "authors": np.uint64,
    "contaminated": np.bool_,
}


@dataclass
class SampleTable:
    """uid, thread, exact, authors: as in data/samples/identity.py, split.py and dedup.py; authors end to end, author_counts of
    each. time: seconds since 1970, inf where unknown. signature: MinHash (N, 128), or (N, 0) where none is asked for.

    Decided: reason: 0 stays, else why not (dedup.REASONS). copy: which of the samples of one uid it is. side: that of its
    group, 0 train, 1 validation. place: where it stands in the shards of its side, counted over all of them; -1 where it does
    not.
    """

    uid: NDArray[np.bytes_]
    size: NDArray[np.int64]
    time: NDArray[np.float64]
    exact: NDArray[np.uint64]
    thread: NDArray[np.uint64]
    author_counts: NDArray[np.int64]
    authors: NDArray[np.uint64]
    contaminated: NDArray[np.bool_]
    signature: NDArray[np.uint32]
    reason: NDArray[np.uint8]
    copy: NDArray[np.int64]
    side: NDArray[np.uint8]
    place: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.exact)

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, NDArray[Any]]], near: bool) -> SampleTable:
        """From the arrays of the chunks that a build prepared (data/pipeline/stages.py), nothing decided yet.

        near: with signatures.
        """
        parts = list(parts)
        columns = {
            name: np.concatenate([np.zeros(0, kind), *(part[name] for part in parts)], dtype=kind)
            for name, kind in _KINDS.items()
        }
        n, width = len(columns["exact"]), PERMUTATIONS if near else 0
        signed = [part["signature"].reshape(-1, width) for part in parts if near]
        return cls(
            **columns,
            signature=np.concatenate([np.zeros((0, width), np.uint32), *signed]) if near else np.zeros((n, 0), np.uint32),
            reason=np.zeros(n, np.uint8),
            copy=np.zeros(n, np.int64),
            side=np.full(n, NEITHER, np.uint8),
            place=np.full(n, -1, np.int64),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> SampleTable:
        """Inverse of arrays()."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def followed_by(self, other: SampleTable) -> SampleTable:
        """Both, the rows of `other` last."""
        mine, more = self.arrays(), other.arrays()
        return SampleTable(**{name: np.concatenate([mine[name], more[name]]) for name in mine})

    def author_lists(self) -> list[list[int]]:
        """The authors of each sample."""
        flat, edges = self.authors.tolist(), np.concatenate([[0], np.cumsum(self.author_counts)]).tolist()
        return [flat[edges[i] : edges[i + 1]] for i in range(len(self))]
