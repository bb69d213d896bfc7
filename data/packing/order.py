"""The global order: a pure function of (seed, epoch, data set), the same on every machine and for every world size.

    blocks of the data set, permuted  ->  windows of some thousand dialogues  ->  packs (pack.py), permuted

Only blocks are permuted globally, so a window reads whole blocks in one go; inside a window every dialogue can meet every
other. A position is (epoch, window, pack): finding it again plans one window, however far the run has come.

Keys come from blake2b and splitmix64 rather than from numpy's generators, whose streams may change between versions (NEP 19).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

# Dialogues per window, about; fewer where they are long, because the tokens of a window stay in memory while it is used.
WINDOW_DIALOGUES = 16_384
WINDOW_TOKENS = 1 << 25
# Packs per window, at least about: the last one is on average half empty.
WINDOW_PACKS = 256


class DialogueBlock(Protocol):
    """A block of n dialogues: ids (sum of lengths,), offsets Int64["n+1"], loss_mask Bool (like ids), n uids."""

    @property
    def ids(self) -> NDArray[Any]: ...
    @property
    def offsets(self) -> NDArray[np.int64]: ...
    @property
    def loss_mask(self) -> NDArray[np.bool_]: ...
    @property
    def uids(self) -> Sequence[str]: ...


class DialogueSource(Protocol):
    """What the stream needs of a data set of N dialogues in B blocks; `chatmill.data.shards.dataset.TokenDataset` is one.

    lengths, loss_tokens: integers (N,). block_starts: Int64["B+1"], dialogue index at which each block starts.
    fingerprint: changes when any token, mask, tokenizer, template or the order of the dialogues changes.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def lengths(self) -> NDArray[Any]: ...
    @property
    def loss_tokens(self) -> NDArray[Any]: ...
    @property
    def block_starts(self) -> NDArray[np.int64]: ...
    def read_block(self, block: int) -> DialogueBlock: ...
    def uid(self, index: int) -> str: ...


def shuffle_keys(count: int, *parts: object) -> NDArray[np.uint64]:
    """`count` 64-bit keys, a pure function of the parts: the finaliser of splitmix64 over a counter."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            int.from_bytes(digest, "little")
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(count: int, *parts: object) -> NDArray[np.int64]:
    """A permutation of range(count), a pure function of the parts."""
    return np.argsort(shuffle_keys(count, *parts), kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True)
class Order:
    """Which blocks make up which window, for the first `dialogues` dialogues of a data set.

    block_starts: Int64["B+1"], cut at `dialogues`. windows: number of windows of an epoch.
    """

    fingerprint: str
    seed: int
    shuffle: bool
    dialogues: int
    block_starts: NDArray[np.int64]
    windows: int

    @staticmethod
    def of(source: DialogueSource, *, capacity: int, seed: int, shuffle: bool, max_dialogues: int | None = None) -> Order:
        """The order of a data set, or of its first max_dialogues dialogues, for packs of `capacity` tokens."""
        total = len(source.lengths)
        count = total if max_dialogues is None else min(max_dialogues, total)
        if count <= 0:
            raise ConfigError("data.order: the data set holds no dialogue.\nBuild it again with `chatmill data build`.")
        starts = np.asarray(source.block_starts, dtype=np.int64)
        if starts[0] != 0 or starts[-1] != total:
            raise ConfigError(f"data.order: blocks span dialogues {starts[0]}..{starts[-1]}, the index holds {total}.")
        starts = np.append(starts[starts < count], count)
        mean = max(1.0, float(np.mean(source.lengths[: min(count, 65_536)])))
        per_window = min(max(WINDOW_DIALOGUES, WINDOW_PACKS * capacity / mean), max(WINDOW_TOKENS, 64 * capacity) / mean)
        # Evenly sized windows: a small last one would pack badly.
        windows = min(len(starts) - 1, max(1, round(count / per_window)))
        return Order(source.fingerprint, seed, shuffle, count, starts, windows)

    def blocks(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The blocks of a window, in order."""
        count = len(self.block_starts) - 1
        low, high = window * count // self.windows, (window + 1) * count // self.windows
        if not self.shuffle:
            return np.arange(low, high, dtype=np.int64)
        return permutation(count, "blocks", self.seed, epoch, self.fingerprint)[low:high]

    def keys(self, epoch: int, window: int, what: str, count: int) -> NDArray[np.uint64]:
        """Sorting keys for `count` things of a window: pseudo-random, or their own order where shuffle is off."""
        if not self.shuffle:
            return np.arange(count, dtype=np.uint64)
        return shuffle_keys(count, what, self.seed, epoch, window, self.fingerprint)
