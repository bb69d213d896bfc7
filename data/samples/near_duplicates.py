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

from ..cleaning.scripts import UNSPACED
from ..conversation import Conversation
from .dedup import canonical

PERMUTATIONS, ROWS, SEED = 128, 8, 42
NEIGHBOURS = 16  # compared in a bucket: a cluster of n costs 16 n comparisons per band, not n²
SHINGLE = 3
_CHARACTERS = UNSPACED + "\uac00-\ud7af"
_ASCII_WORD = re.compile("[a-z0-9]+")  # what _TOKEN finds in ASCII
_TOKEN = re.compile(f"[{_CHARACTERS}]|[^\\W_{_CHARACTERS}]+")  # Latin words end where Chinese begins, without a space


def words_of(text: str) -> list[str]:
    """Words of the canonical text, without punctuation."""
    plain = canonical(text)
    return (_ASCII_WORD if plain.isascii() else _TOKEN).findall(plain)


def shingles(text: str) -> set[str]:
    """Word triples of the canonical text; shorter texts are one shingle."""
    words = words_of(text)
    runs = zip(*(words[k:] for k in range(SHINGLE)), strict=False)
    return set(map(" ".join, runs)) if len(words) > SHINGLE else {" ".join(words)}


def dialogue_text(conversation: Conversation) -> str:
    """What is compared: all turns except the system's."""
    return "\n".join(turn.content for turn in conversation.turns if turn.role != "system")


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signature of each text; the same on every machine. (n, PERMUTATIONS)"""
    if not texts:
        return np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    tokens = [list(shingles(text)) for text in texts]  # the minima do not depend on their order
    return np.array(rensa.RMinHash.digest_matrix_from_token_sets(tokens, PERMUTATIONS, SEED).to_rows(), dtype=np.uint32)


def near_pairs(signature: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """Pairs (i < j) of rows whose estimated Jaccard index is at least threshold. (k, 2), sorted, each once.

    Of equal rows, each is paired with the next. Among different ones, all of a bucket are compared, or where it holds more than
    NEIGHBOURS of them, each with the NEIGHBOURS that follow in the order of their hashes. So the order of the rows decides
    nothing: the split and its certificate find the same.
    """
    name = _hash(signature)
    order = np.argsort(name, kind="stable")
    again = np.flatnonzero(name[order][1:] == name[order][:-1])
    found = [np.stack([order[again], order[again + 1]], axis=1)]
    first = np.ones(len(order), dtype=bool)
    first[again + 1] = False
    rows = order[first]  # one of each, by hash
    for start in range(0, PERMUTATIONS, ROWS):
        key = _hash(signature[rows, start : start + ROWS])
        place = np.argsort(key, kind="stable")
        key, here = key[place], rows[place]
        for step in range(1, NEIGHBOURS + 1):
            same = np.flatnonzero(key[step:] == key[:-step])
            if not len(same):
                break
            found += _close(signature, np.stack([here[same], here[same + step]], axis=1), threshold)
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0).astype(np.int64).reshape(-1, 2)


def _close(signature: NDArray[np.uint32], pairs: NDArray[np.int64], threshold: float) -> list[NDArray[np.int64]]:
    """The pairs whose estimate reaches the threshold, 64 MiB of signatures at a time."""
    out = []
    for k in range(0, len(pairs), 65_536):
        part = pairs[k : k + 65_536]
        out.append(part[(signature[part[:, 0]] == signature[part[:, 1]]).mean(axis=1) >= threshold])
    return out


def _hash(rows: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """One 64-bit hash per row: a polynomial in an odd base modulo 2**64, mixed."""
    powers = np.array([pow(0x9E3779B97F4A7C15, k + 1, 1 << 64) for k in range(rows.shape[1])], dtype=np.uint64)
    total = np.zeros(len(rows), dtype=np.uint64)
    for column, power in enumerate(powers):  # a product of the whole matrix would take twice its size again
        total += rows[:, column].astype(np.uint64) * power
    total ^= total >> np.uint64(32)
    return np.asarray(total * np.uint64(0xD6E8FEB86659FD93))
