"""Keys and values of past replies, so that the next turn of a conversation reads only what is new.

    store.keep(generation)              # when a reply is complete: its tokens with their keys and values
    store.lend(next_generation)         # copies the longest beginning that its prompt shares with a kept one

Keys and values of a token depend only on the tokens before it, so a shared beginning need not be read again; the result
differs only in rounding. Another variant of the model has other keys and values for the same tokens: it is lent nothing.
Bounded by tokens; the least recently used conversation is dropped first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.kv_cache import KVCache
from .generation import Generation

WORTHWHILE = 32  # tokens: fewer are read as fast as they are copied
Key = tuple[int, tuple[int, ...]]  # variant, token ids


class PrefixStore:
    """capacity: most tokens to keep, over all conversations; 0 keeps nothing."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: dict[Key, tuple[Tensor, Tensor]] = {}  # least recently used first

    @property
    def tokens(self) -> int:
        """Tokens kept now."""
        return sum(len(ids) for _, ids in self._kept)

    def keep(self, steps: Generation) -> None:
        """Copy what a reply has read, in place of a kept conversation that it continues. Out of memory, all are dropped."""
        ids, same = tuple(steps.read_ids), self._of(steps.variant)
        if not isinstance(steps.cache, KVCache):  # of transformers: its states are read again
            return
        if not WORTHWHILE <= len(ids) <= self.capacity or any(kept[: len(ids)] == ids for kept in same):
            return
        for old in [old for old in same if ids[: len(old)] == old]:
            del self._kept[steps.variant, old]
        while self.tokens + len(ids) > self.capacity:
            del self._kept[next(iter(self._kept))]
        cache = steps.cache
        try:
            self._kept[steps.variant, ids] = (cache.k[:, :, : len(ids)].clone(), cache.v[:, :, : len(ids)].clone())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.clear()

    def lend(self, steps: Generation) -> int:
        """Fill the cache of a new reply; returns how many tokens of its prompt are filled in. The last one is always read."""
        prompt = steps.pending.tolist()[:-1]
        best = max(self._of(steps.variant), key=lambda ids: shared(ids, prompt), default=())
        count = shared(best, prompt)
        if count < WORTHWHILE:
            return 0
        key = steps.variant, best
        k, v = self._kept[key] = self._kept.pop(key)  # now the most recently used
        steps.start_from(k[:, :, :count], v[:, :, :count])
        return count

    def _of(self, variant: int) -> list[tuple[int, ...]]:
        return [ids for kept, ids in self._kept if kept == variant]

    def clear(self) -> None:
        """Free the memory."""
        self._kept.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on a GPU or a CPU; for the latter torch has only a RuntimeError with these words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("allocate memory", "not enough memory"))


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
