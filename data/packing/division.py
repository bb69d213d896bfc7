"""How the ranks of a context divide a batch: rank r of C takes the tokens r, r + C, r + 2C ... of its T.

Stripes give every rank as many tokens as the others, and nearly as many attended pairs (a query with each key that it sees):
the tokens of a document are dealt in turn, so the late ones, which see much, are spread like the early ones. For a document of
L tokens the ranks differ by up to 2C / L of their share; documents begin at any rank, so that over a batch this averages out.
One division serves both ways to attend together (trainer/parallel/): after an exchange of heads every rank sees whole
documents; around a ring rank r meets the stripe of rank j with  t' <= t,  t = aC + r and t' = bC + j,  and that is causal
attention of equal lengths: b <= a where j <= r, b <= a - 1 where j > r.

Needs no torch. Source: Brandon et al., "Striped Attention", arXiv:2311.09431.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


def stripe_bounds(cu_seqlens: Ints, rank: int, ranks: int) -> Ints:
    """Int32["S+1"]: where the segments lie among this rank's tokens; a segment shorter than C may have none there."""
    return ((cu_seqlens - rank + ranks - 1) // ranks).astype(np.int32)


def ring_bounds(positions: Ints, ranks: int) -> list[Ints]:
    """For every step s of the ring: cu_seqlens of this rank's queries beside the keys of the rank s places before it.

    positions Int32["T/C"]: of this rank's tokens in their documents. Key row a of step s is the token s places before query row
    a. Where that lies before the document (position < s), the query sees nothing in this step: such a row is a segment of its
    own, whose result does not count. There is at most one per document.
    """
    T = len(positions)
    first = positions < ranks  # the first token of its document on this rank
    bounds = []
    for step in range(ranks):
        alone = positions < step
        starts = first.copy()
        starts[1:] |= alone[:-1]
        bounds.append(np.append(np.flatnonzero(starts), T).astype(np.int32))
    return bounds


def attended_pairs(cu_seqlens: Ints, ranks: int, window: int | None = None) -> NDArray[np.int64]:
    """Int64["C"]: pairs of query and key, t' <= t in the same segment, by the rank that holds the query."""
    lengths = np.diff(cu_seqlens)
    seen = np.arange(int(cu_seqlens[-1])) - np.repeat(cu_seqlens[:-1], lengths) + 1
    if window is not None:
        seen = np.minimum(seen, window)
    return np.array([int(seen[rank::ranks].sum()) for rank in range(ranks)], np.int64)
