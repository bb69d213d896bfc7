"""A checkpoint seen with rows for tokens that it was not trained with.

    source = with_new_rows(base, config, tokenizer)       # base itself where the tokenizer has no new tokens
    engine.load_model(source)                             # any engine

A new row is the mean of the rows of all tokens that the checkpoint's own tokenizer has, in the embedding and, where it is not
tied, in the head: the new token starts as an average one. So do all rows by which a table grows. Rows that the checkpoint holds
as padding are used before it grows, and the number of rows keeps the multiple that it had (up to 64).
Source: J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import torch
from torch import Tensor

from ...data.tokenizer.tokenizer import ChatTokenizer
from ..model_config import ModelConfig
from .checkpoint import Checkpoint
from .rows import new_tokens, rows_needed
from .sharding import TensorSource

_CHUNK = 4096  # rows read at once for the mean


def rows_for(checkpoint: Checkpoint, tokenizer: ChatTokenizer, where: str) -> int:
    """Rows that the checkpoint's tables need for the tokenizer: its own number, or more for new special tokens.

    Raises ConfigError where the tokenizer differs from the checkpoint's in anything else. where: what was tokenised with it.
    """
    return rows_needed(checkpoint.path, checkpoint.config.vocab_size, tokenizer, where)


def with_new_rows(checkpoint: Checkpoint, config: ModelConfig, tokenizer: ChatTokenizer) -> TensorSource:
    """The checkpoint's tensors for a model of this config and tokenizer (`rows_for` says how many rows that needs)."""
    new = new_tokens(checkpoint.path, tokenizer, "the run")
    if not new and config.vocab_size == checkpoint.config.vocab_size:
        return checkpoint
    trained = {i for i in ChatTokenizer.load(checkpoint.path, use_template=False).ids() if i < checkpoint.config.vocab_size}
    return WiderTables(checkpoint, config.vocab_size, trained, set(new.values()) - trained, config.tables)


class WiderTables:
    """A TensorSource whose tables (by name) have `rows` rows; everything else is read from the source.

    Rows of `new` tokens, and those beyond the source's, are the mean of the rows of `trained` tokens.
    """

    def __init__(
        self,
        source: TensorSource,
        rows: int,
        trained: Collection[int],
        new: Collection[int],
        tables: Collection[str] = ("embed.weight", "head.weight"),
    ) -> None:
        self._source, self._tables, self._rows = source, tables, rows
        self._trained = torch.tensor(sorted(trained))
        self._new = sorted(new)
        self._means: dict[str, Tensor] = {}

    def names(self, group: str = "model") -> list[str]:
        """As the source's."""
        return self._source.names(group)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; a table has more rows."""
        held = self._source.shape(name)
        return (self._rows, *held[1:]) if name in self._tables else held

    def tensor(self, name: str) -> Tensor:
        """One tensor by name."""
        if name not in self._tables:
            return self._source.tensor(name)
        shape = self.shape(name)
        return self.read(name, 0, prod(shape)).reshape(shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        if name not in self._tables:
            return self._source.read(name, start, stop)
        mean, held = self._mean(name), prod(self._source.shape(name))
        width = len(mean)
        values = torch.empty(stop - start, dtype=mean.dtype)
        inside = max(0, min(stop, held) - start)
        if inside:
            values[:inside] = self._source.read(name, start, start + inside)
        values[inside:] = mean[torch.arange(start + inside, stop) % width]
        for row in self._new:
            low, high = max(start, row * width), min(stop, (row + 1) * width)
            if low < high:
                values[low - start : high - start] = mean[low - row * width : high - row * width]
        return values

    def _mean(self, name: str) -> Tensor:
        """Mean of the trained rows, in the source's dtype; summed in fp64 in a fixed order, so it is the same on every rank."""
        if name not in self._means:
            rows, width = self._source.shape(name)
            total = torch.zeros(width, dtype=torch.float64)
            for first in range(0, rows, _CHUNK):
                last = min(first + _CHUNK, rows)
                part = self._source.read(name, first * width, last * width)
                chosen = self._trained[(self._trained >= first) & (self._trained < last)] - first
                total += part.reshape(-1, width)[chosen].double().sum(0)
                dtype = part.dtype
            self._means[name] = (total / len(self._trained)).to(dtype)
        return self._means[name]
