"""Which packs make up which step: the whole plan of a run without any token read, and its position as a few integers.

    schedule = Schedule(mixture, StreamOptions(sequence_length=2048, global_batch=64, seed=0))
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

from chatmill.config import ConfigError

from .mixture import Mixture, largest_deficit
from .options import StreamOptions
from .order import Order
from .windows import OpenWindow, Pack, quarantined

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
    """The steps of a run: a pure function of the data sets and the options. The division among ranks plays no part.

    An excluded dialogue is not used from its step on. A window planned before keeps its other dialogues where they are; the
    place of the excluded ones becomes padding. Blocks in the quarantine of a data set are excluded in the same way: by a new
    run from its first step on, by a continued one from the step at which it first met them. The state names them, so that the
    past can be planned again.
    """

    def __init__(self, mixture: Mixture, options: StreamOptions) -> None:
        self.mixture, self.options = mixture, options
        self.sources = list(mixture.sources.values())
        self.orders = [
            Order.of(
                source,
                capacity=options.sequence_length,
                seed=options.seed,
                shuffle=options.shuffle,
                max_dialogues=options.max_dialogues,
            )
            for source in self.sources
        ]
        self.counts: Counter[str] = Counter()
        self._exclude = [(int(step), frozenset(uids)) for step, uids in sorted(options.exclude.items())]
        self._uids: dict[tuple[int, int], frozenset[str]] = {}
        # (first step, blocks) by data set
        self._held: list[list[tuple[int, frozenset[int]]]] = [
            [(0, held)] if (held := quarantined(source)) else [] for source in self.sources
        ]

    def exclude(self, step: int, uids: Collection[str]) -> None:
        """Leave dialogues out from a step on. The caller checks that this step is still to come."""
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
        epochs, max_tokens = self.options.epochs, self.options.max_tokens
        while max_tokens is None or position.tokens < max_tokens:
            cursors, taken = list(position.cursors), list(position.taken)
            if self.mixture.changes_at(position.step):
                taken = [0] * len(taken)
            shares = self.mixture.shares(position.step)
            packs: list[Pack] = []
            while len(packs) < self.options.packs:
                able = [epochs is None or cursor.epoch < epochs for cursor in cursors]
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
        order, epochs = self.orders[number], self.options.epochs
        barren = 0
        while True:
            if opened is None:
                if cursor.pack == 0:
                    cursor = replace(cursor, opened=step)
                excluded, held = self._excluded_since(-1, cursor.opened), self._held_since(number, -1, cursor.opened)
                source = self.sources[number]
                opened = OpenWindow(source, order, cursor.epoch, cursor.window, self.options, excluded, held)
                self.counts.update(opened.plan.counts)
            index, last_index = cursor.pack, len(opened.packs) - 1
            pack = self._pack(number, opened, index, cursor.opened, step) if index <= last_index else None
            if index >= last_index:
                last = cursor.window + 1 == order.windows
                cursor = Cursor(cursor.epoch + last, 0 if last else cursor.window + 1)
                opened = None
            else:
                cursor = Cursor(cursor.epoch, cursor.window, index + 1, cursor.opened)
            if pack is not None or (epochs is not None and cursor.epoch >= epochs):
                return pack, cursor, opened
            barren += 1
            if barren > order.windows:
                raise ConfigError(
                    "data.stream: no dialogue of the data set can be used: all are empty, excluded, or longer than "
                    f"sequence_length={self.options.sequence_length} without a supervised token in that range."
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
        return frozenset[int]().union(*(blocks for first, blocks in entries if opened < first <= step))

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
            new = quarantined(self.sources[i]).difference(*(blocks for _, blocks in history))
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
        o = self.options
        first = {"version": STATE_VERSION, "sequence_length": o.sequence_length, "global_batch": o.packs}
        return first | {"seed": o.seed, "shuffle": o.shuffle, "overlong": o.overlong, "overlap": o.overlap}

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
