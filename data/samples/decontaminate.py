"""Keep evaluation texts out of the training data: samples that share a run of n words with them are dropped.

    known = benchmark_hashes(["evals/"], 13);  contaminated(conversation, known, 13) -> bool

Words are those of the canonical text, so case, punctuation and whitespace do not hide a copy. Evaluation texts of fewer than n
words are ignored, because they are too common.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..conversation import Conversation
from ..importers.registry import read_file
from ..ledger import Ledger
from ..raw.files import RawFile, find_files
from ..recipe import SourceSection
from .near_duplicates import words_of


def run_hashes(text: str, n: int) -> NDArray[np.uint64]:
    """One hash for every run of n words."""
    words = words_of(text)
    if len(words) < n:
        return np.zeros(0, dtype=np.uint64)
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    # A polynomial in an odd base modulo 2**64 (by overflow): order matters, and all runs are hashed at once.
    powers = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(n)], dtype=np.uint64)
    return np.asarray((sliding_window_view(hashes, n) * powers).sum(axis=1, dtype=np.uint64))


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
