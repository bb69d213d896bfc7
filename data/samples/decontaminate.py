"""Keep evaluation texts out of the training data: samples that share a run of n words with them are dropped.

    known = benchmark_hashes(["evals/"], 13);  contaminated(conversation, known, 13) -> bool

Words are those of the canonical text, so case, punctuation and whitespace do not hide a copy. In scripts without spaces one and
a half characters count as a word: 13 words are 20 Chinese characters. Evaluation texts of fewer than n words are ignored,
because they are too common.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..cleaning.scripts import CHARACTERS_PER_WORD, UNSPACED
from ..conversation import Conversation
from ..importers.registry import read_file
from ..ledger import Ledger
from ..raw.files import RawFile
from ..raw.finding import find_files
from ..recipe import SourceSection
from .near_duplicates import words_of

_UNSPACED_UNIT = re.compile(f"[{UNSPACED}]")
_BASE = 0x9E3779B97F4A7C15
_WORD, _CHARACTER = 3, round(3 / CHARACTERS_PER_WORD)  # sizes in thirds of a word


def run_hashes(text: str, n: int) -> NDArray[np.uint64]:
    """One hash for every run of n words. (runs,)"""
    words = words_of(text)
    size = np.array([_CHARACTER if _UNSPACED_UNIT.fullmatch(word) else _WORD for word in words], dtype=np.int64)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
    # The run that begins at i is the shortest one that holds n words: it depends on nothing outside it.
    last = np.searchsorted(ends, ends[:-1] + n * _WORD)
    first = np.flatnonzero(last <= len(words))
    if not len(first):
        return np.zeros(0, dtype=np.uint64)
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    # A polynomial in an odd base modulo 2**64 (by overflow): order matters, and all runs are hashed at once. A run's
    # sum is a difference of sums from the start, shifted back by the inverse of the base.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes * _powers(_BASE, len(words)), dtype=np.uint64)])
    return np.asarray((sums[last[first]] - sums[first]) * _powers(pow(_BASE, -1, 1 << 64), len(words))[first])


def _powers(base: int, n: int) -> NDArray[np.uint64]:
    """base**0 … base**(n-1) modulo 2**64."""
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(max(n - 1, 0), base, dtype=np.uint64)]), dtype=np.uint64)


def benchmark_files(paths: Sequence[str]) -> list[RawFile]:
    """Files of the evaluation sets."""
    return [file for path in paths for file in find_files(path)]


def benchmark_hashes(paths: Sequence[str], n: int) -> NDArray[np.uint64]:
    """Sorted hashes of all runs in all turns of the evaluation sets."""
    found = [np.zeros(0, dtype=np.uint64)]
    for path in paths:
        options = SourceSection(path=path)
        for file in find_files(path):
            for conversation in read_file(file, options, Ledger()):
                found += [run_hashes(turn.content, n) for turn in conversation.turns]
    return np.unique(np.concatenate(found))


def contaminated(conversation: Conversation, known: NDArray[np.uint64], n: int) -> bool:
    """Does any turn share a run of n words with the evaluation sets?"""
    for turn in conversation.turns:
        hashes = run_hashes(turn.content, n)
        if len(hashes) and len(known):
            at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            if (known[at] == hashes).any():
                return True
    return False
