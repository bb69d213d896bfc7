"""Near duplicates: MinHash signatures (rensa), banding, and a check of every candidate pair.

    signatures(texts) -> uint32 (n, 128);  near_pairs(signatures, 0.8) -> int64 (k, 2)

Two texts are near when the Jaccard index of their sets of word triples is at least the threshold, as estimated from 128 minima
(standard error at 0.8: 0.035). Bands of 8 rows, 16 of them: a pair at 0.8 becomes a candidate with probability 0.95, at 0.9
with 0.9999.
Texts in scripts without spaces are cut into characters. Source: Broder 1997; Leskovec, Rajaraman & Ullman, chapter 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import rensa
from numpy.typing import NDArray

from ..conversation import Conversation
from .dedup import canonical

PERMUTATIONS, ROWS, SEED = 128, 8, 42
SHINGLE = 3
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\W_]+")


def words_of(text: str) -> list[str]:
    """Words of the canonical text, without punctuation."""
    return _TOKEN.findall(canonical(text))


def shingles(text: str) -> set[str]:
    """Word triples of the canonical text; shorter texts are one shingle."""
    words = words_of(text)
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def dialogue_text(conversation: Conversation) -> str:
    """What is compared: all turns except the system's."""
    return "\n".join(turn.content for turn in conversation.turns if turn.role != "system")


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signature of each text; the same on every machine. (n, PERMUTATIONS)"""
    if not texts:
        return np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    tokens = [sorted(shingles(text)) for text in texts]
    return np.array(rensa.RMinHash.digest_matrix_from_token_sets(tokens, PERMUTATIONS, SEED).to_rows(), dtype=np.uint32)


def near_pairs(signature: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """Pairs (i < j) of rows whose estimated Jaccard index is at least threshold. (k, 2), sorted, each once.

    In a bucket of a band every member is compared with the first: a cluster of n costs n - 1 comparisons per band, not n².
    """
    found: list[NDArray[np.int64]] = []
    for start in range(0, PERMUTATIONS, ROWS):
        keys = np.ascontiguousarray(signature[:, start : start + ROWS]).view(np.dtype((np.void, 4 * ROWS))).ravel()
        order = np.argsort(keys, kind="stable")
        fresh = np.ones(len(keys), dtype=bool)
        fresh[1:] = keys[order][1:] != keys[order][:-1]
        heads = order[np.maximum.accumulate(np.where(fresh, np.arange(len(keys)), 0))]
        pairs = np.stack([heads[~fresh], order[~fresh]], axis=1)
        found.append(np.sort(pairs, axis=1))
    candidates = np.unique(np.concatenate([np.zeros((0, 2), dtype=np.int64), *found]), axis=0)
    close = [np.zeros(0, dtype=bool)]
    for k in range(0, len(candidates), 65_536):  # 64 MiB at a time
        part = candidates[k : k + 65_536]
        close.append((signature[part[:, 0]] == signature[part[:, 1]]).mean(axis=1) >= threshold)
    chosen: NDArray[np.int64] = candidates[np.concatenate(close)]
    return chosen
