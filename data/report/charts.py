"""Bars, columns and token strips as plain HTML and CSS: they follow the width of the page and the colours of the system.

    columns([("16", 120), ("32", 300)], "tokens per dialogue")        bars([("en", 420)], total=500)

No script, no picture, no outside file. All texts are escaped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from .pieces import TokenPiece

MOST_COLUMNS = 14


def compact(n: int) -> str:
    """1234 as 1.2k."""
    for limit, unit in ((1_000_000_000, "G"), (1_000_000, "M"), (10_000, "k")):
        if n >= limit:
            scale = {"G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{n / scale:.1f}{unit}" if n / scale < 100 else f"{n / scale:.0f}{unit}"
    return f"{n:,}"


def percent(share: float) -> str:
    """0.0004 as <0.1 %."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def columns(values: Sequence[tuple[str, int]], what: str) -> str:
    """Upright columns, each with its count above and its label below."""
    most = max((count for _, count in values), default=0) or 1
    parts = [
        f'<div class="column"><span>{compact(count) if count else ""}</span>'
        f'<i style="--share:{count / most:.4f}"></i><em>{escape(label)}</em></div>'
        for label, count in values
    ]
    described = ", ".join(f"{label}: {count}" for label, count in values)
    return f'<figure class="columns" role="img" aria-label="{escape(f"{what}: {described}")}">{"".join(parts)}</figure>'


@dataclass(frozen=True, slots=True)
class BarRow:
    """A lying bar: label, (class, share of the width) of each piece, figure and small print behind it."""

    label: str
    pieces: tuple[tuple[str, float], ...]
    figure: str
    note: str

    def html(self) -> str:
        """Three cells of the grid."""
        track = "".join(f'<i class="{kind}" style="width:{100 * share:.2f}%"></i>' for kind, share in self.pieces)
        behind = f"{escape(self.figure)} <small>{escape(self.note)}</small>"
        return f'<span>{escape(self.label)}</span><div class="track">{track}</div><span class="n">{behind}</span>'


def bar_rows(rows: Sequence[BarRow]) -> str:
    """Lying bars below one another."""
    return f'<div class="bars">{"".join(row.html() for row in rows)}</div>'


def bars(values: Sequence[tuple[str, int]], total: int) -> str:
    """Lying bars with label, count and share of the total."""
    shares = [count / (total or 1) for _, count in values]
    return bar_rows(
        [
            BarRow(label, (("kept", share),), f"{count:,}", percent(share))
            for (label, count), share in zip(values, shares, strict=True)
        ]
    )


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


def token_strip(pieces: Sequence[TokenPiece]) -> str:
    """Tokens side by side, told apart by shade; <b> where they carry loss, <i> where not. Line feeds show as ↵."""
    marks = {True: "b", False: "i"}
    return "".join(
        f"<{marks[piece.has_loss]}>{escape(piece.text).replace(chr(10), '↵' + chr(10))}</{marks[piece.has_loss]}>"
        for piece in pieces
    )
