"""A planned window of a data set, with the blocks of it that were read, and the packs that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

from .options import StreamOptions
from .order import DialogueBlock, DialogueSource, Order
from .pack import plan_window


class OpenWindow:
    """A planned window of one data set, and the blocks of it that were read so far.

    excluded, held: ids and blocks that the plan leaves out.
    pieces: (block, local, offset, length, context) of each piece; packs: (first piece, last, tokens, loss tokens) of each pack.
    """

    def __init__(
        self,
        source: DialogueSource,
        order: Order,
        epoch: int,
        window: int,
        options: StreamOptions,
        excluded: frozenset[str],
        held: frozenset[int],
    ) -> None:
        self.source = source
        self._numbers = order.blocks(epoch, window)
        self._unreadable = quarantined(source)
        self._blocks: dict[int, DialogueBlock] = {}
        self._holes: dict[tuple[frozenset[str], frozenset[int]], NDArray[np.bool_]] = {}
        will_read = getattr(source, "will_read", None)
        if will_read is not None:  # a remote data set fetches ahead: this window, then the next one
            will_read([number for number in self._numbers.tolist() if number not in self._unreadable])
            if window + 1 < order.windows:
                will_read([n for n in order.blocks(epoch, window + 1).tolist() if n not in self._unreadable])
        self.plan = plan = plan_window(
            source,
            order,
            epoch,
            window,
            capacity=options.sequence_length,
            overlong=options.overlong,
            overlap=options.overlap,
            loss_mask_of=self._loss_mask,
            excluded=self._indices(excluded) | self._members(held),
        )
        columns = (plan.block, plan.local, plan.offset, plan.length, plan.context)
        # Plain tuples: one piece at a time they are several times faster than arrays.
        self.pieces: list[tuple[int, ...]] = list(zip(*(column.tolist() for column in columns), strict=True))
        starts = plan.pack_starts.tolist()
        totals = plan.pack_tokens.tolist(), plan.pack_loss.tolist()
        self.packs: list[tuple[int, ...]] = list(zip(starts[:-1], starts[1:], *totals, strict=True))

    def block(self, block: int) -> DialogueBlock:
        """A block, read when it is first needed."""
        found = self._blocks.get(block)
        if found is None:
            if block in self._unreadable:
                raise ConfigError(
                    f"data.stream: block {block} was put into the quarantine after the run had planned its present window. "
                    "One of its dialogues is longer than a pack, and where it was cut can no longer be known.\n"
                    "Restore the block (chatmill data verify DIR --repair), or start a new run from the checkpoint."
                )
            data = self.source.read_block(block)
            low, high = self.source.block_starts[block : block + 2]
            if not np.array_equal(np.diff(data.offsets), self.source.lengths[low:high]):
                raise ConfigError(
                    f"data.stream: block {block} disagrees with the index on the lengths of its dialogues.\n"
                    "Shards and index do not belong together: run `chatmill data verify`, then build the data set again."
                )
            found = self._blocks[block] = data
        return found

    def hole(self, uids: frozenset[str], blocks: frozenset[int] = frozenset()) -> NDArray[np.bool_]:
        """Bool["U"]: which pieces of the plan belong to dialogues or blocks excluded after the window was planned."""
        found = self._holes.get((uids, blocks))
        if found is None:
            indices = self._indices(uids) | self._members(blocks)
            found = np.isin(self.plan.dialogue, np.fromiter(indices, np.int64, len(indices)))
            self._holes[uids, blocks] = found
        return found

    def _members(self, blocks: frozenset[int]) -> set[int]:
        """The dialogues of these blocks, as far as they are in this window."""
        starts = self.source.block_starts
        inside = [number for number in self._numbers.tolist() if number in blocks] if blocks else []
        return {dialogue for number in inside for dialogue in range(int(starts[number]), int(starts[number + 1]))}

    def _indices(self, uids: frozenset[str]) -> set[int]:
        if not uids:
            return set()
        out = set()
        for number in self._numbers.tolist():
            if number in self._unreadable:  # left out as a whole
                continue
            first = int(self.source.block_starts[number])
            names = self.block(number).uids
            if not uids.isdisjoint(names):
                out |= {first + place for place, name in enumerate(names) if name in uids}
        return out

    def _loss_mask(self, block: int, place: int) -> NDArray[np.bool_]:
        data = self.block(block)
        return data.loss_mask[data.offsets[place] : data.offsets[place + 1]]


@dataclass(frozen=True, slots=True)
class Pack:
    """One pack of a step: pieces `first` to `last` of a window's plan, but those marked in `hole`."""

    source: int
    window: OpenWindow
    first: int
    last: int
    tokens: int
    loss_tokens: int
    hole: NDArray[np.bool_] | None

    def indices(self) -> NDArray[np.int64]:
        """Its pieces, as indices into the columns of window.plan."""
        indices = np.arange(self.first, self.last)
        return indices if self.hole is None else indices[~self.hole[self.first : self.last]]

    @property
    def count(self) -> int:
        """Number of its pieces."""
        return self.last - self.first if self.hole is None else len(self.indices())

    def uids(self) -> list[str]:
        """Its dialogues in order, one entry per piece."""
        return [self.window.block(block).uids[local] for block, local, *_ in self.pieces()]

    def pieces(self) -> list[tuple[int, ...]]:
        """Its pieces as in OpenWindow.pieces."""
        if self.hole is None:
            return self.window.pieces[self.first : self.last]
        return [self.window.pieces[i] for i in self.indices().tolist()]


def quarantined(source: DialogueSource) -> frozenset[int]:
    """The blocks of a data set that must not be read."""
    return frozenset(getattr(source, "quarantined", ()))
