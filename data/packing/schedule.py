"""Which packs make up which step: the whole plan of a run without any token read, and its position as a few integers.

    schedule = Schedule(mixture, sequence_length=2048, global_batch=64, seed=0)
    for planned in schedule.steps(Position()): planned.step, planned.packs, planned.loss_tokens

Needs no torch: `stream.py` makes tensors of it for one rank, `usage.py` answers which dialogue was used when.
Every step depends on the position before it alone, so a run is continued at once at any step.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

from .mixture import Mixture, largest_deficit
from .order import DialogueBlock, DialogueSource, Order
from .pack import Overlong, WindowPlan, plan_window

STATE_VERSION = 1
_CURSOR = ("epoch", "window", "pack", "opened")


@dataclass(frozen=True, slots=True)
class Cursor:
    """Place of the next pack in one data set. opened: step in which the first pack of the window was used."""

    epoch: int = 0
    window: int = 0
    pack: int = 0
    opened: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """Place in the stream. step and micro: `micro` micro-batches of step `step` are handed out.

    As `step` begins: tokens: used so far (without padding); cursors: one per data set; taken: packs of each since the weights
    last changed.
    """

    step: int = 0
    micro: int = 0
    tokens: int = 0
    cursors: tuple[Cursor, ...] = (Cursor(),)
    taken: tuple[int, ...] = (0,)


class OpenWindow:
    """A planned window of one data set, and the blocks of it that were read so far.

    pieces: (block, local, offset, length, context) of each piece; packs: (first piece, last, tokens, loss tokens) of each pack.
    """

    def __init__(self, source: DialogueSource, order: Order, epoch: int, window: int, options: Mapping[str, Any]) -> None:
        self.source = source
        self._numbers = order.blocks(epoch, window)
        self._dialogues = order.dialogues
        self._unreadable: frozenset[int] = getattr(source, "quarantined", frozenset())
        self._blocks: dict[int, DialogueBlock] = {}
        self._holes: dict[tuple[frozenset[str], frozenset[int]], NDArray[np.bool_]] = {}
        will_read = getattr(source, "will_read", None)
        if will_read is not None:  # a remote data set fetches ahead: this window, then the next one
            will_read([number for number in self._numbers.tolist() if number not in self._unreadable])
            if window + 1 < order.windows:
                will_read([n for n in order.blocks(epoch, window + 1).tolist() if n not in self._unreadable])
        options = dict(options)
        excluded = self._indices(options.pop("excluded")) | self._members(options.pop("held"))
        self.plan: WindowPlan = plan_window(
            source, order, epoch, window, loss_mask_of=self._loss_mask, excluded=excluded, **options
        )
        plan = self.plan
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
                    f"data.stream: block {block} came into the quarantine after the window that the run is in was planned, and "
                    "one of its dialogues is longer than a pack: where it was cut is not known any more.\n"
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


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The packs of one step in global order, and the positions before and after it."""

    packs: list[Pack]
    tokens: int
    loss_tokens: int
    start: Position
    end: Position

    @property
    def step(self) -> int:
        """Number of the step, from 0."""
        return self.start.step


class Schedule:
    """The steps of a run: a pure function of the data sets, the settings and the seed.

    global_batch: packs per step. epochs: each data set is used so many times, then left out (None: for ever). max_tokens: no
    step begins once so many tokens were used. exclude: {first step: uids}: from that step on these dialogues are not used. A
    window planned before keeps its other dialogues where they are; the place of the excluded ones becomes padding.

    Blocks in the quarantine of a data set (`quarantined`) are excluded in the same way: by a new run from its first step on, by
    one that is continued from the step at which it first met them. The state names them, so that the past can be planned again.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        sequence_length: int,
        global_batch: int,
        seed: int = 0,
        overlong: Overlong = "truncate",
        overlap: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        max_tokens: int | None = None,
        max_dialogues: int | None = None,
        exclude: Mapping[int, Collection[str]] | None = None,
    ) -> None:
        self.mixture = mixture
        self.sequence_length, self.global_batch = sequence_length, global_batch
        self.epochs, self.max_tokens, self.seed = epochs, max_tokens, seed
        self.overlong, self.overlap, self.shuffle = overlong, overlap, shuffle
        self.sources = list(mixture.sources.values())
        self.orders = [
            Order.of(source, capacity=sequence_length, seed=seed, shuffle=shuffle, max_dialogues=max_dialogues)
            for source in self.sources
        ]
        self.counts: Counter[str] = Counter()
        self._exclude = [(int(step), frozenset(uids)) for step, uids in sorted((exclude or {}).items())]
        self._uids: dict[tuple[int, int], frozenset[str]] = {}
        # (first step, blocks) by data set
        self._held: list[list[tuple[int, frozenset[int]]]] = [
            [(0, held)] if (held := _quarantined(source)) else [] for source in self.sources
        ]

    def exclude(self, step: int, uids: Collection[str]) -> None:
        """Leave dialogues out from a step on. It must not have been taken yet: whoever holds the position checks that."""
        self._exclude = sorted([*self._exclude, (int(step), frozenset(uids))], key=lambda item: item[0])
        self._uids.clear()

    @property
    def start(self) -> Position:
        """Where a new run begins."""
        return Position(cursors=(Cursor(),) * len(self.sources), taken=(0,) * len(self.sources))

    # ---------------------------------------------------------------- steps

    def steps(self, position: Position | None = None) -> Iterator[StepPlan]:
        """Every step from the beginning of that of `position` on."""
        position = replace(position or self.start, micro=0)
        opened: list[OpenWindow | None] = [None] * len(self.sources)
        while self.max_tokens is None or position.tokens < self.max_tokens:
            cursors, taken = list(position.cursors), list(position.taken)
            if self.mixture.changes_at(position.step):
                taken = [0] * len(taken)
            shares = self.mixture.shares(position.step)
            packs: list[Pack] = []
            while len(packs) < self.global_batch:
                able = [self.epochs is None or cursor.epoch < self.epochs for cursor in cursors]
                chosen = largest_deficit(shares, taken, able)
                if chosen is None:
                    break
                pack, cursors[chosen], opened[chosen] = self._take(chosen, cursors[chosen], opened[chosen], position.step)
                if pack is not None:
                    packs.append(pack)
                    taken[chosen] += 1
            if not packs:
                return
            tokens, loss = sum(pack.tokens for pack in packs), sum(pack.loss_tokens for pack in packs)
            end = Position(position.step + 1, 0, position.tokens + tokens, tuple(cursors), tuple(taken))
            yield StepPlan(packs, tokens, loss, position, end)
            position = end

    def _take(
        self, number: int, cursor: Cursor, opened: OpenWindow | None, step: int
    ) -> tuple[Pack | None, Cursor, OpenWindow | None]:
        """The next pack of a source, the cursor after it, and the window that the cursor is in (None: not planned yet)."""
        order = self.orders[number]
        barren = 0
        while True:
            if opened is None:
                if cursor.pack == 0:
                    cursor = replace(cursor, opened=step)
                options: dict[str, Any] = {"capacity": self.sequence_length, "overlong": self.overlong, "overlap": self.overlap}
                options["excluded"] = self._excluded(cursor.opened)
                options["held"] = self._held_since(number, -1, cursor.opened)
                opened = OpenWindow(self.sources[number], order, cursor.epoch, cursor.window, options)
                self.counts.update(opened.plan.counts)
            index, last_index = cursor.pack, len(opened.packs) - 1
            pack = self._pack(number, opened, index, cursor.opened, step) if index <= last_index else None
            if index >= last_index:
                last = cursor.window + 1 == order.windows
                cursor = Cursor(cursor.epoch + last, 0 if last else cursor.window + 1)
                opened = None
            else:
                cursor = Cursor(cursor.epoch, cursor.window, index + 1, cursor.opened)
            if pack is not None or (self.epochs is not None and cursor.epoch >= self.epochs):
                return pack, cursor, opened
            barren += 1
            if barren > order.windows:
                raise ConfigError(
                    "data.stream: no dialogue of the data set can be used: all are empty, excluded, or longer than "
                    f"sequence_length={self.sequence_length} without a supervised token in that range."
                )

    def _pack(self, number: int, window: OpenWindow, index: int, opened: int, step: int) -> Pack:
        first, last, tokens, loss = window.packs[index]
        late = self._excluded_since(opened, step) if self._exclude else frozenset[str]()
        late_blocks = self._held_since(number, opened, step)
        if late or late_blocks:
            plan = window.plan
            hole = window.hole(late, late_blocks)
            out = hole[first:last]
            if out.any():
                tokens -= int(plan.length[first:last][out].sum())
                loss -= int(plan.loss[first:last][out].sum())
                return Pack(number, window, first, last, tokens, loss, hole)
        return Pack(number, window, first, last, tokens, loss, None)

    def _excluded(self, step: int) -> frozenset[str]:
        """Every uid excluded at a step."""
        return self._excluded_since(-1, step)

    def _excluded_since(self, opened: int, step: int) -> frozenset[str]:
        """The uids excluded at `step` that were not yet so at `opened`. The same object each time: its hash is kept."""
        before, now = (sum(first <= at for first, _ in self._exclude) for at in (opened, step))
        if (before, now) not in self._uids:
            old = frozenset[str]().union(*(uids for _, uids in self._exclude[:before]))
            self._uids[before, now] = frozenset[str]().union(*(uids for _, uids in self._exclude[:now])) - old
        return self._uids[before, now]

    def _held_since(self, number: int, opened: int, step: int) -> frozenset[int]:
        """The blocks of a data set left out at `step` that were not yet so at `opened`."""
        entries = self._held[number]
        return frozenset[int]().union(*(blocks for first, blocks in entries if opened < first <= step)) if entries else _NONE

    # ---------------------------------------------------------------- position

    def state(self, position: Position) -> dict[str, Any]:
        """A position, and what it belongs to, as plain integers and strings."""
        past = position.step + bool(position.micro)  # steps whose weights and exclusions can no longer change
        return self._settings() | {
            "step": position.step,
            "micro": position.micro,
            "tokens": position.tokens,
            "weights": self.mixture.past(past) if len(self.sources) > 1 else [],
            "excluded": self._past_exclusions(past),
            "sources": {
                name: self._source_identity(i)
                | {key: getattr(position.cursors[i], key) for key in _CURSOR}
                | {"taken": position.taken[i]}
                | self._past_quarantine(i, past)
                for i, name in enumerate(self.mixture.sources)
            },
        }

    def position(self, state: Mapping[str, Any]) -> Position:
        """The position saved in a state. Raises ConfigError naming the first field in which it belongs to another schedule."""
        for name, value in self._settings().items():
            _same(name, state, value)
        saved = state["sources"]
        cursors, taken = [], []
        past = int(state["step"]) + bool(int(state["micro"]))
        held = list(self._held)
        for i, name in enumerate(self.mixture.sources):
            if name not in saved:  # a data set that later weights bring in
                cursors.append(Cursor())
                taken.append(0)
                continue
            for field, value in self._source_identity(i).items():
                _same(field, saved[name], value, f" of data set {name!r}" if len(self.sources) > 1 else "")
            cursor = Cursor(*(int(saved[name][key]) for key in _CURSOR))
            if not 0 <= cursor.window < self.orders[i].windows or min(cursor.epoch, cursor.pack, int(saved[name]["taken"])) < 0:
                raise ConfigError(f"data.stream: the saved position lies outside the data set: {cursor}.")
            cursors.append(cursor)
            taken.append(int(saved[name]["taken"]))
            history = [(int(first), frozenset(map(int, blocks))) for first, blocks in saved[name].get("quarantine", ())]
            new = _quarantined(self.sources[i]).difference(*(blocks for _, blocks in history))
            held[i] = [*history, (past, new)] if new else history
        gone = sorted(set(saved) - set(self.mixture.sources))
        if gone:
            raise ConfigError(
                f"data.stream: cannot resume: data set {gone[0]!r} is missing. Keep it, with weight 0 from now on."
            )
        step, micro = int(state["step"]), int(state["micro"])
        if len(self.sources) > 1:
            _same("weights", state, self.mixture.past(past), f" before step {past}")
        _same("excluded", state, self._past_exclusions(past), f" before step {past}")
        self._held = held  # what the run has left out so far, and what it meets now
        return Position(step, micro, int(state["tokens"]), tuple(cursors), tuple(taken))

    def _settings(self) -> dict[str, Any]:
        names = ("sequence_length", "global_batch", "seed", "shuffle", "overlong", "overlap")
        return {"version": STATE_VERSION} | {name: getattr(self, name) for name in names}

    def _source_identity(self, number: int) -> dict[str, Any]:
        source = self.sources[number]
        manifest = getattr(source, "manifest", None) or {}
        names = ("vocab_size", "tokenizer_sha256", "template_sha256")
        known = {name: manifest[name] for name in names if name in manifest}
        return known | {"dialogues": self.orders[number].dialogues, "fingerprint": source.fingerprint}

    def _past_quarantine(self, number: int, step: int) -> dict[str, Any]:
        entries = [[first, sorted(blocks)] for first, blocks in self._held[number] if first < step]
        return {"quarantine": entries} if entries else {}

    def _past_exclusions(self, step: int) -> list[list[Any]]:
        return [
            [first, len(uids), hashlib.sha256("\n".join(sorted(uids)).encode()).hexdigest()]
            for first, uids in self._exclude
            if first < step
        ]


_NONE: frozenset[int] = frozenset()


def _quarantined(source: DialogueSource) -> frozenset[int]:
    return frozenset(getattr(source, "quarantined", _NONE))


def _same(name: str, saved: Mapping[str, Any], value: Any, where: str = "") -> None:
    if name not in saved:
        raise ConfigError(f"data.stream: the saved position has no field {name!r}: it is not one of this version.")
    if saved[name] != value:
        advice = _ADVICE.get(name, "Resume with the data set, tokenizer and settings of the run, or start a new run.")
        raise ConfigError(f"data.stream: cannot resume: {name}{where} was {saved[name]!r}, is {value!r}.\n{advice}")


_ADVICE = {
    "global_batch": "Choose world_size x micro_batch x accumulation equal to the saved one (or larger, with global_batch=).",
    "weights": "The past cannot change: give the old weights for those steps, and new ones from a later step on.",
    "excluded": "The past cannot change: exclude dialogues from the step of the checkpoint on, or a later one.",
}
