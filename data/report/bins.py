"""Counts over bins, for charts and tables.

binned_lengths(lengths)     [("64", 33), ("128", 65)]: by powers of two, named by their lower edge
binned_turns({2: 40, 4: 1}) [("2", 40), ("3", 0), ("4", 1)]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_COLUMNS = 14


def binned_lengths(lengths: NDArray[np.uint32]) -> list[tuple[str, int]]:
    """Counts over powers of two: label of the lower edge, count."""
    top = int(lengths.max()).bit_length()
    low = max(int(lengths.min()).bit_length() - 1, top - MOST_COLUMNS)
    exponents = np.clip(np.floor(np.log2(np.maximum(lengths, 1))).astype(int), low, None)
    counts = np.bincount(exponents - low, minlength=top - low)
    names = [compact_power(low + k) for k in range(len(counts))]
    names[0] = names[0] if int(lengths.min()) >= 2**low else f"<{compact_power(low + 1)}"
    return list(zip(names, counts.tolist(), strict=True))


def compact_power(exponent: int) -> str:
    """2**exponent: 512, 1k, 2k."""
    return f"{1 << exponent}" if exponent < 10 else f"{1 << (exponent - 10)}k" if exponent < 20 else f"{1 << (exponent - 20)}M"


def binned_turns(turns: dict[int, int]) -> list[tuple[str, int]]:
    """Single numbers of turns up to ten, wider bins above."""
    edges = [*range(1, 11), 13, 17, 25, 49]
    bins: list[tuple[str, int]] = []
    for k, low in enumerate(edges):
        high = edges[k + 1] - 1 if k + 1 < len(edges) else None
        count = sum(n for value, n in turns.items() if value >= low and (high is None or value <= high))
        bins.append((str(low) if high == low else f"{low}+" if high is None else f"{low}–{high}", count))
    while len(bins) > 1 and not bins[-1][1]:
        bins.pop()
    while len(bins) > 1 and not bins[0][1]:
        bins.pop(0)
    return bins
