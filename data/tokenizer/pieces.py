"""A text that was encoded in pieces: its ids, and which token stands where.

pieces = Pieces(starts=[0, 17], encodings=[...]);  pieces.ids();  pieces.token_at(17)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding


@dataclass(frozen=True)
class Pieces:
    """starts: the first character of each piece, ascending; encodings: theirs."""

    starts: Sequence[int]
    encodings: Sequence[Encoding]

    def ids(self) -> list[int]:
        """Ids of the whole text."""
        return [i for piece in self.encodings for i in piece.ids]

    def token_at(self, char: int) -> int | None:
        """Index of the token that a character belongs to; of the first character of a piece, the piece's first token."""
        k = bisect_right(self.starts, char) - 1
        before = sum(len(piece.ids) for piece in self.encodings[:k])
        if char == self.starts[k]:
            return before
        found = self.encodings[k].char_to_token(char - self.starts[k])
        return None if found is None else before + int(found)

    def offsets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(first character, character after the last) of every token, each Int64["L"]."""
        pairs = [(at + a, at + b) for at, piece in zip(self.starts, self.encodings, strict=True) for a, b in piece.offsets]
        lefts, rights = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return lefts, rights
