"""Everything that decides what a packed stream hands out, in one record.

options = StreamOptions(sequence_length=2048, micro_batch=4, seed=0); replace(options, rank=1, world_size=2)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

from .pack import Overlong

Annotate = Callable[[NDArray[np.int32], int], Any]


@dataclass(frozen=True)
class StreamOptions:
    """The order of a run, the division of its steps among ranks, and how a rank works. Impossible values raise ConfigError.

    Order. sequence_length: tokens per pack. overlong: what happens to longer dialogues (pack.py); overlap: tokens of context
    that pieces of a split dialogue repeat. epochs: passes over each data set (None: for ever). max_tokens: no step begins once
    that many tokens were used. max_dialogues: only the first that many of each data set. exclude: {first step: uids}, not used
    from that step on. global_batch: packs per step (None: world_size x micro_batch x accumulation).
    Division. micro_batch: packs per batch; accumulation: batches per step and rank. context: so many ranks divide each batch
    (division.py), and this one takes the stripe context_rank; rank and world_size then count such groups.
    Work. annotate(cu_seqlens, T): builds PackedBatch.tile_maps, off the training thread. pin: batches in page-locked memory.
    prefetch: batches that a thread builds ahead.
    """

    sequence_length: int
    micro_batch: int = 1
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    context: int = 1
    context_rank: int = 0
    global_batch: int | None = None
    seed: int = 0
    overlong: Overlong = "truncate"
    overlap: int = 0
    shuffle: bool = True
    epochs: int | None = None
    max_tokens: int | None = None
    max_dialogues: int | None = None
    exclude: Mapping[int, Collection[str]] = field(default_factory=dict)
    annotate: Annotate | None = None
    pin: bool = False
    prefetch: int = 2

    def __post_init__(self) -> None:
        sizes = f"micro_batch={self.micro_batch}, accumulation={self.accumulation}, world_size={self.world_size}"
        checks = (
            (self.sequence_length >= 2, f"sequence_length={self.sequence_length}: expected at least 2"),
            (min(self.micro_batch, self.accumulation, self.world_size) >= 1, f"{sizes}: expected at least 1"),
            (0 <= self.rank < self.world_size, f"rank={self.rank}: expected 0..{self.world_size - 1} ({sizes})"),
            (
                0 <= self.context_rank < self.context,
                f"context_rank={self.context_rank}: expected 0..{self.context - 1} (context={self.context})",
            ),
            (
                self.micro_batch * self.sequence_length % max(1, self.context) == 0,
                f"context={self.context} does not divide the {self.micro_batch} x {self.sequence_length} tokens of a batch",
            ),
            (self.packs >= 1, f"global_batch={self.global_batch}: expected at least 1"),
            (self.overlong in ("truncate", "split", "drop"), f"overlong={self.overlong!r}: expected truncate, split or drop"),
            (0 <= self.overlap < self.sequence_length, f"overlap={self.overlap}: expected 0..{self.sequence_length - 1}"),
            (self.epochs is None or self.epochs >= 1, f"epochs={self.epochs}: expected at least 1, or None for ever"),
        )
        for fine, message in checks:
            if not fine:
                raise ConfigError(f"data.stream: {message}.")

    @property
    def slots(self) -> int:
        """Packs that all ranks together take in a step."""
        return self.world_size * self.micro_batch * self.accumulation

    @property
    def packs(self) -> int:
        """Packs of a step; slots without one are padding."""
        return self.slots if self.global_batch is None else self.global_batch
