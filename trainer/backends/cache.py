"""What a foreign model keeps of the tokens that it has read: transformers' cache, or the tokens themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ForeignCache:
    """One conversation. states: transformers' DynamicCache, which keeps all tokens of every layer; None: they are read again.

    ids: the tokens read so far, in pieces.
    """

    def __init__(self, capacity: int, with_states: bool) -> None:
        if capacity < 1:
            raise ValueError(f"ForeignCache: capacity must be at least 1 token, got {capacity}.")
        self.capacity = capacity
        self.length = 0
        self.ids: list[Tensor] = []
        self.states: Any = None
        if with_states:
            from transformers import DynamicCache

            self.states = DynamicCache()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"ForeignCache.truncate: expected 0..{self.length} tokens to keep, got {length}.")
        if self.states is not None and length < self.length:
            self.states.crop(length)
        self.ids = [torch.cat(self.ids)[:length]] if length else []
        self.length = length

    def reserve(self, tokens: int) -> None:
        """Raise ValueError for tokens that do not fit."""
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"ForeignCache: {self.length} + {tokens} tokens exceed the capacity of {self.capacity}.\n"
                "Shorten the conversation or create the cache with a larger capacity."
            )

    def add(self, tokens: Tensor) -> None:
        """Note tokens that were read."""
        self.ids.append(tokens)
        self.length += len(tokens)
