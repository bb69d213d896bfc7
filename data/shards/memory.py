"""Dialogues in memory, with the interface of `TokenDataset`: for tests, benchmarks and trying the stream without shards.

source = MemoryDataset.random(1000, mean=200)
source = MemoryDataset([(uid, ids, loss_mask), ...])
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """ids UInt16 or UInt32 (n_tokens,), offsets Int64 (n+1,), loss_mask Bool (n_tokens,), n uids."""

    ids: NDArray[Any]
    offsets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    uids: list[str]


class MemoryDataset:
    """dialogues: (uid, ids, loss_mask) each; block: dialogues per block."""

    def __init__(
        self, dialogues: Sequence[tuple[str, Sequence[int], Sequence[bool]]], *, vocab_size: int = 65_536, block: int = 64
    ) -> None:
        self.uids = [uid for uid, _, _ in dialogues]
        self.ids = [np.asarray(ids, np.uint16 if vocab_size <= 65_536 else np.uint32) for _, ids, _ in dialogues]
        self.masks = [np.asarray(mask, bool) for _, _, mask in dialogues]
        self.vocab_size = vocab_size
        self.lengths = np.array([len(ids) for ids in self.ids], np.uint32)
        self.loss_tokens = np.array([np.count_nonzero(mask) for mask in self.masks], np.uint32)
        self.block_starts = np.append(np.arange(0, len(self.uids), block), len(self.uids)).astype(np.int64)
        self.manifest = {"vocab_size": vocab_size, "tokenizer_sha256": "none", "template_sha256": "none"}
        digest = hashlib.sha256()
        for uid, ids, mask in zip(self.uids, self.ids, self.masks, strict=True):
            digest.update(uid.encode() + ids.tobytes() + mask.tobytes())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def random(
        cls,
        count: int,
        *,
        mean: float = 200,
        longest: int = 100_000,
        spread: float = 0.8,
        block: int = 64,
        seed: int = 0,
        name: str = "d",
    ) -> MemoryDataset:
        """Dialogues of log-normal length and random ids, user and assistant stretches taking turns."""
        rng = np.random.default_rng(seed)
        lengths = np.clip(rng.lognormal(np.log(mean) - spread**2 / 2, spread, count), 2, longest).astype(int)
        dialogues: list[tuple[str, Any, Any]] = []
        for i, length in enumerate(lengths.tolist()):
            turns = rng.integers(1, max(3, length // 4), 2 + length // 2)
            mask = np.resize(np.repeat(np.arange(len(turns)) % 2 == 1, turns), length)
            mask[0], mask[-1] = False, mask[-1] or not mask[1:].any()  # something to learn, and not from nothing
            dialogues.append((f"{name}{i:07d}", rng.integers(1, 60_000, length), mask))
        return cls(dialogues, block=block)

    def __len__(self) -> int:
        return len(self.uids)

    def read_block(self, block: int) -> MemoryBlock:
        """Block number `block`, put together from its dialogues."""
        part = slice(int(self.block_starts[block]), int(self.block_starts[block + 1]))
        offsets = np.concatenate([[0], np.cumsum(self.lengths[part])]).astype(np.int64)
        return MemoryBlock(np.concatenate(self.ids[part]), offsets, np.concatenate(self.masks[part]), self.uids[part])

    def uid(self, index: int) -> str:
        """Id of a dialogue."""
        return self.uids[index]


class IndexedDataset:
    """A data set of any size of which only the index is kept: a block's tokens are made up when it is read.

    Of every dialogue of n tokens the last n // 2 are supervised.
    """

    def __init__(
        self, count: int, *, mean: float = 500, spread: float = 1.0, longest: int = 8192, block: int = 512, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
        self.lengths = np.clip(lengths, 4, longest).astype(np.uint32)
        self.loss_tokens = self.lengths // 2
        self.block_starts = np.append(np.arange(0, count, block), count).astype(np.int64)
        self.vocab_size = 65_536
        self.fingerprint = f"made up: {count} {mean} {spread} {longest} {block} {seed}"
        self.reads = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def read_block(self, block: int) -> MemoryBlock:
        """Random tokens for a block, the same each time."""
        self.reads += 1
        first, last = (int(k) for k in self.block_starts[block : block + 2])
        lengths = self.lengths[first:last].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.random.default_rng(block).integers(1, self.vocab_size, int(offsets[-1]), dtype=np.uint16)
        place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
        mask = place >= np.repeat(lengths - lengths // 2, lengths)
        return MemoryBlock(ids, offsets, mask, [self.uid(k) for k in range(first, last)])

    def uid(self, index: int) -> str:
        """Id of a dialogue."""
        return f"made-up-{index:09d}"
