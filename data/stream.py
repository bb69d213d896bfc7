"""Packed batches for training: exact, elastic, resumable, with no communication between the ranks.

    stream = PackedStream(dataset, sequence_length=2048, micro_batch=4, rank=rank, world_size=world_size, seed=0)
    for batch in stream: ...            # `accumulation` batches make one step
    state = stream.state_dict()         # a few integers, the same on every rank
    PackedStream(...).load_state_dict(state)   # any world size x micro_batch x accumulation with an equal product

Step g is packs [g B, (g + 1) B) of the global order (order.py, pack.py), B = world_size x micro_batch x accumulation. Rank r
takes, as its micro-batch a, the packs from (a x world_size + r) x micro_batch on. Every rank plans every pack, so the token
counts of a whole step are known on the host of each; a rank reads only the blocks its own packs need.

Speed: python -m chatmill.data.stream_bench
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from chatmill.config import ConfigError
from chatmill.data.order import DialogueSource, Order
from chatmill.data.pack import Overlong, WindowPlan, plan_window
from chatmill.data.prefetch import Prefetcher

IGNORE = -100
ROW_MULTIPLE = 128
STATE_VERSION = 1
Annotate = Callable[[NDArray[np.int32], int], Any]


@dataclass(frozen=True)
class PackedBatch:
    """micro_batch packs of one rank, end to end: T = micro_batch x sequence_length tokens, S segments.

    tokens Int32["T"], padding is 0. targets Int64["T"]: the token after tokens[t] in the same dialogue where it is supervised,
    else -100. positions Int32["T"]: restart at 0 in every segment. cu_seqlens Int32["S+1"]: 0 .. T; padding, at the end of a
    pack, is a segment of its own. rows Int32["R"]: where targets != -100, then -1 up to a multiple of 128.
    loss_tokens, n_tokens: of this batch, without padding. step_loss_tokens, step_tokens: of the whole step, all ranks and all
    accumulation. uids: dialogues in order. plan: what `annotate` made of cu_seqlens.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    max_seqlen: int
    loss_tokens: int
    n_tokens: int
    step_loss_tokens: int
    step_tokens: int
    uids: tuple[str, ...]
    plan: Any = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The batch with its tensors, and its plan where that can, on `device`."""
        move = getattr(self.plan, "to", None)
        plan = move(device, non_blocking=non_blocking) if callable(move) else self.plan
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking), plan)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, for copies that overlap with computation."""
        pin = getattr(self.plan, "pin_memory", None)
        return self._map(lambda tensor: tensor.pin_memory(), pin() if callable(pin) else self.plan)

    def _map(self, change: Callable[[Tensor], Tensor], plan: Any) -> PackedBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return PackedBatch(**values | {"plan": plan})


@dataclass(frozen=True, slots=True)
class Cursor:
    """Place of the next pack in the order of one data set."""

    epoch: int = 0
    window: int = 0
    pack: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """Place in the stream: `micro` micro-batches of step `step` are handed out; cursor is where that step begins."""

    step: int = 0
    micro: int = 0
    cursor: Cursor = Cursor()


class OpenWindow:
    """A planned window and the blocks of it that were read so far, supervised tokens stored as ~id."""

    def __init__(self, source: DialogueSource, order: Order, epoch: int, window: int, options: dict[str, Any]) -> None:
        self._source = source
        self._blocks: dict[int, tuple[NDArray[np.int32], tuple[str, ...]]] = {}
        self.plan: WindowPlan = plan_window(source, order, epoch, window, loss_mask_of=self._loss_mask, **options)

    def _loss_mask(self, block: int, place: int) -> NDArray[np.bool_]:
        first = int(self._source.block_starts[block])
        lengths = self._source.lengths[first : first + place + 1].astype(np.int64)
        stop = int(lengths.sum())
        return self.block(block)[0][stop - int(lengths[-1]) : stop] < 0

    def block(self, block: int) -> tuple[NDArray[np.int32], tuple[str, ...]]:
        """Tokens of a block, Int32 (~id where supervised), and its uids."""
        found = self._blocks.get(block)
        if found is None:
            data = self._source.read_block(block)
            low, high = self._source.block_starts[block : block + 2]
            if not np.array_equal(np.diff(data.offsets), self._source.lengths[low:high]):
                raise ConfigError(
                    f"data.stream: block {block} disagrees with the index on the lengths of its dialogues.\n"
                    "Shards and index do not belong together: run `chatmill data verify`, then build the data set again."
                )
            signed = data.ids.astype(np.int32)
            np.bitwise_xor(signed, np.negative(data.loss_mask.view(np.int8)), out=signed)
            found = self._blocks[block] = signed, tuple(data.uids)
        return found


Pack = tuple[OpenWindow, int]


class PackedStream(IterableDataset[PackedBatch]):
    """The batches of one rank, for ever or for `epochs`.

    dataset: token shards, or anything that looks like `order.DialogueSource`.
    sequence_length: tokens per pack. overlong: what happens to longer dialogues (pack.py); overlap: for `split`, in tokens.
    shuffle=False, epochs=1: evaluation; every dialogue exactly once over all ranks. The last step is filled up with fully
    masked packs, so that all ranks take the same number of steps.
    max_dialogues: only the first so many of the data set. global_batch: packs per step, where the product of world_size,
    micro_batch and accumulation is larger (the rest is masked packs): any world size can then continue any run.
    annotate(cu_seqlens, T): builds PackedBatch.plan, off the training thread. prefetch: batches built ahead by a thread, or 0.

    As a torch IterableDataset: DataLoader(stream, batch_size=None, num_workers=n) gives the same batches in the same order.
    """

    def __init__(
        self,
        dataset: DialogueSource,
        *,
        sequence_length: int,
        micro_batch: int = 1,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        overlong: Overlong = "truncate",
        overlap: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        max_dialogues: int | None = None,
        global_batch: int | None = None,
        annotate: Annotate | None = None,
        pin: bool = False,
        prefetch: int = 2,
    ) -> None:
        slots = world_size * micro_batch * accumulation
        checks = (
            (sequence_length >= 2, f"sequence_length={sequence_length}: expected at least 2"),
            (min(micro_batch, accumulation, world_size) >= 1, "micro_batch, accumulation and world_size must be at least 1"),
            (0 <= rank < world_size, f"rank={rank}: expected 0..{world_size - 1} (world_size={world_size})"),
            (overlong in ("truncate", "split", "drop"), f"overlong={overlong!r}: expected truncate, split or drop"),
            (0 <= overlap < sequence_length, f"overlap={overlap}: expected 0..{sequence_length - 1}"),
            (epochs is None or epochs >= 1, f"epochs={epochs}: expected at least 1, or None for ever"),
            (
                global_batch is None or 1 <= global_batch <= slots,
                f"global_batch={global_batch}: expected 1..{slots} (world_size x micro_batch x accumulation)",
            ),
        )
        for fine, message in checks:
            if not fine:
                raise ConfigError(f"data.stream: {message}.")
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.rank, self.world_size = rank, world_size
        self.global_batch = global_batch or slots
        self.epochs = epochs
        self.seed = seed
        self.order = Order.of(dataset, capacity=sequence_length, seed=seed, shuffle=shuffle, max_dialogues=max_dialogues)
        self.counts: Counter[str] = Counter()  # dialogues of the windows opened so far: seen, truncated, split, dropped
        self._plan_options = {"capacity": sequence_length, "overlong": overlong, "overlap": overlap}
        self._annotate, self._pin, self._prefetch = annotate, pin, prefetch
        self._position = Position()
        self._ended = False
        self._ramp = np.arange(micro_batch * sequence_length, dtype=np.int32)

    # ---------------------------------------------------------------- position

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, as plain integers and strings: the same on every rank."""
        position = self._position
        state = self._identity() | {
            "step": position.step,
            "micro": position.micro,
            "epoch": position.cursor.epoch,
            "window": position.cursor.window,
            "pack": position.cursor.pack,
        }
        if position.micro:  # inside a step the split over ranks matters
            state["layout"] = [self.world_size, self.micro_batch, self.accumulation]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict. Raises ConfigError naming the first field in which this stream is another one."""
        mine = self._identity()
        for name, value in mine.items():
            if name not in state:
                raise ConfigError(f"data.stream: the saved position has no field {name!r}: it is not one of this stream.")
            if state[name] != value:
                advice = _ADVICE.get(name, _SAME)
                raise ConfigError(f"data.stream: cannot resume: {name} was {state[name]!r}, is {value!r}.\n{advice}")
        micro = int(state["micro"])
        layout = [self.world_size, self.micro_batch, self.accumulation]
        if micro and list(state.get("layout", ())) != layout:
            raise ConfigError(
                f"data.stream: cannot resume inside a step with another layout: [world_size, micro_batch, accumulation] was "
                f"{state.get('layout')}, is {layout}.\nSave at the end of a step, or resume with the same layout."
            )
        cursor = Cursor(int(state["epoch"]), int(state["window"]), int(state["pack"]))
        if not 0 <= cursor.window < self.order.windows or min(cursor.epoch, cursor.pack, micro, int(state["step"])) < 0:
            raise ConfigError(f"data.stream: the saved position lies outside the data set: {cursor}.")
        self._position = Position(int(state["step"]), micro, cursor)
        self._ended = False

    def _identity(self) -> dict[str, Any]:
        manifest = getattr(self.dataset, "manifest", None) or {}
        names = ("tokenizer_sha256", "template_sha256", "vocab_size")
        return {
            "version": STATE_VERSION,
            "sequence_length": self.sequence_length,
            "global_batch": self.global_batch,
            "seed": self.seed,
            "shuffle": self.order.shuffle,
            "overlong": self._plan_options["overlong"],
            "overlap": self._plan_options["overlap"],
            "dialogues": self.order.dialogues,
            **{name: manifest[name] for name in names if name in manifest},
            "fingerprint": self.order.fingerprint,
        }

    # ---------------------------------------------------------------- iteration

    def __iter__(self) -> Iterator[PackedBatch]:
        """Batches from the present position on; after the end of the last epoch, from the beginning."""
        if self._ended:
            self._position, self._ended = Position(), False
        batches = self._batches(self._position)
        ahead = self._prefetch if torch.utils.data.get_worker_info() is None else 0
        with Prefetcher(batches, ahead) as ready:
            for batch, after in ready:
                self._position = after
                yield batch
        self._ended = True

    def _batches(self, position: Position) -> Iterator[tuple[PackedBatch, Position]]:
        """Every batch of this rank with the position after it."""
        worker = torch.utils.data.get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        at = 0
        for step, packs, start, end in self.steps(position):
            step_loss = sum(int(window.plan.pack_loss[pack]) for window, pack in packs)
            step_tokens = sum(int(window.plan.pack_tokens[pack]) for window, pack in packs)
            for micro in range(position.micro if step == position.step else 0, self.accumulation):
                mine = at % turns == turn  # loader workers take turns
                at += 1
                if not mine:
                    continue
                first = (micro * self.world_size + self.rank) * self.micro_batch
                batch = self._assemble(packs[first : first + self.micro_batch], step_loss, step_tokens)
                last = micro + 1 == self.accumulation
                yield batch, Position(step + 1, 0, end) if last else Position(step, micro + 1, start)

    def steps(self, position: Position) -> Iterator[tuple[int, list[Pack], Cursor, Cursor]]:
        """Global batches, planned but not read: step, its packs, the cursor before and after it."""
        cursor, opened = position.cursor, None
        window_at = (-1, -1)
        step = position.step
        barren = 0
        while True:
            start = cursor
            packs: list[Pack] = []
            while len(packs) < self.global_batch and (self.epochs is None or cursor.epoch < self.epochs):
                if opened is None or window_at != (cursor.epoch, cursor.window):
                    window_at = (cursor.epoch, cursor.window)
                    opened = OpenWindow(self.dataset, self.order, *window_at, self._plan_options)
                    self.counts.update(opened.plan.counts)
                    barren = 0 if opened.plan.packs else barren + 1
                    if barren > self.order.windows:
                        raise ConfigError(
                            "data.stream: no dialogue of the data set can be used: all are empty, or longer than "
                            f"sequence_length={self.sequence_length} without a supervised token in that range."
                        )
                if cursor.pack < opened.plan.packs:
                    packs.append((opened, cursor.pack))
                    cursor = replace(cursor, pack=cursor.pack + 1)
                if cursor.pack >= opened.plan.packs:
                    last = cursor.window + 1 == self.order.windows
                    cursor = Cursor(cursor.epoch + last, 0 if last else cursor.window + 1, 0)
            if not packs:
                return
            yield step, packs, start, cursor
            step += 1

    def _assemble(self, packs: list[Pack], step_loss: int, step_tokens: int) -> PackedBatch:
        """One micro-batch; packs may be fewer than micro_batch, the rest is then padding."""
        T = self.micro_batch * self.sequence_length
        signed = np.zeros(T + 1, np.int32)  # id, or ~id where supervised; one more so that every token has a next
        lengths: list[int] = []
        uids: list[str] = []
        at = loss = used = 0
        for k in range(self.micro_batch):
            end = (k + 1) * self.sequence_length
            if k < len(packs):
                window, p = packs[k]
                plan = window.plan
                piece = slice(int(plan.pack_starts[p]), int(plan.pack_starts[p + 1]))
                loss += int(plan.pack_loss[p])
                used += int(plan.pack_tokens[p])
                columns = (plan.block, plan.local, plan.offset, plan.length, plan.context)
                for block, local, offset, length, context in zip(*(c[piece].tolist() for c in columns), strict=True):
                    ids, names = window.block(block)
                    signed[at : at + length] = ids[offset : offset + length]
                    if context:
                        head = signed[at : at + context]
                        head ^= head >> 31
                    at += length
                    lengths.append(length)
                    uids.append(names[local])
            if at < end:
                lengths.append(end - at)
                at = end
        cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        starts = cu_seqlens[:-1]
        signed[starts] ^= signed[starts] >> 31  # the first token of a segment has nothing to be predicted from
        tokens = signed ^ (signed >> 31)
        supervised = signed[1:] < 0
        targets = np.full(T, IGNORE, np.int64)
        np.copyto(targets, tokens[1:], where=supervised)
        valid = np.flatnonzero(supervised)
        if len(valid) != loss:
            raise ConfigError(
                f"data.stream: the index promises {loss} supervised tokens in dialogues {uids[:3]}..., found {len(valid)}.\n"
                "Shards and index do not belong together: run `chatmill data verify`, then build the data set again."
            )
        rows = np.full(max(ROW_MULTIPLE, -(-loss // ROW_MULTIPLE) * ROW_MULTIPLE), -1, np.int32)
        rows[:loss] = valid
        batch = PackedBatch(
            tokens=torch.from_numpy(tokens[:T]),
            targets=torch.from_numpy(targets),
            positions=torch.from_numpy(self._ramp - np.repeat(starts, lengths)),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            rows=torch.from_numpy(rows),
            max_seqlen=max(lengths),
            loss_tokens=loss,
            n_tokens=used,
            step_loss_tokens=step_loss,
            step_tokens=step_tokens,
            uids=tuple(uids),
            plan=self._annotate(cu_seqlens, T) if self._annotate is not None else None,
        )
        return batch.pin_memory() if self._pin and torch.cuda.is_available() else batch


_SAME = "Resume with the data set, tokenizer and settings of the run, or start a new run."
_ADVICE = {
    "global_batch": "Choose world_size x micro_batch x accumulation equal to the saved one (or larger, with global_batch=).",
}
