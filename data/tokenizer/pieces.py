"""A text that was encoded in pieces: its ids, and which token stands where. Pieces of many texts are encoded together.

    pieces = Pieces(starts=[0, 17], encodings=[...]);  pieces.ids();  pieces.token_at(17)

A job is a generator that yields texts, gets their encodings, and returns what it makes of them. `run_together` takes what all
jobs ask for to the tokenizer in one batch, which costs less than one call for each and uses all threads that it may.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from chatmill.config import ConfigError

LONG = 4096  # characters
T = TypeVar("T")
Job = Generator[list[str], list[Encoding], T]


@dataclass(frozen=True)
class Pieces:
    """starts: the first character of each piece, ascending; encodings: theirs."""

    starts: Sequence[int]
    encodings: Sequence[Encoding]

    def ids(self) -> list[int]:
        """Ids of the whole text."""
        return [i for piece in self.encodings for i in piece.ids]

    @cached_property
    def _before(self) -> list[int]:
        """Number of tokens before each piece, and of all."""
        return list(accumulate(map(len, self.encodings), initial=0))

    def token_at(self, char: int) -> int | None:
        """Index of the token that a character belongs to; of the first character of a piece, the piece's first token."""
        k = bisect_right(self.starts, char) - 1
        before = self._before[k]
        if char == self.starts[k]:
            return before
        found = self.encodings[k].char_to_token(char - self.starts[k])
        return None if found is None else before + int(found)

    def offsets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(first character, character after the last) of every token, each Int64["L"]."""
        pairs = [(at + a, at + b) for at, piece in zip(self.starts, self.encodings, strict=True) for a, b in piece.offsets]
        lefts, rights = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return lefts, rights


def encoding_of(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> Encoding:
    """The encoding of one text. `encode` keeps Python's lock (a second per megabyte), `encode_batch` lets it go."""
    if len(text) < LONG:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def run_together(tokenizer: Tokenizer, jobs: Sequence[Job[T]]) -> list[T | ConfigError]:
    """What each job returns, or the ConfigError that it raises."""
    found: dict[int, T | ConfigError] = {}
    answers: dict[int, list[Encoding] | None] = dict.fromkeys(range(len(jobs)))
    while answers:
        asked: dict[int, list[str]] = {}
        for number, answer in answers.items():
            try:
                asked[number] = next(jobs[number]) if answer is None else jobs[number].send(answer)
            except StopIteration as done:
                found[number] = done.value
            except ConfigError as error:
                found[number] = error
        encoded = iter(tokenizer.encode_batch([text for texts in asked.values() for text in texts], add_special_tokens=False))
        answers = {number: [next(encoded) for _ in texts] for number, texts in asked.items()}
    return [found[number] for number in range(len(jobs))]
