"""Packed batches for training: exact, elastic, resumable, with no communication between the ranks.

    stream = PackedStream(dataset, sequence_length=2048, micro_batch=4, rank=rank, world_size=world_size, seed=0)
    for batch in stream: ...            # `accumulation` batches make one step
    state = stream.state_dict()         # a few integers, the same on every rank
    PackedStream(...).load_state_dict(state)   # any world size x micro_batch x accumulation with an equal product

With context=C, C ranks divide each batch, and rank and world_size count such groups.

Step g is packs [g B, (g + 1) B) of the global order (schedule.py), B = world_size x micro_batch x accumulation. Rank r
takes, as its micro-batch a, the packs from (a x world_size + r) x micro_batch on. Every rank plans every pack, so the token
counts of a whole step are known on the host of each; a rank reads only the blocks its own packs need.

Speed: python -m chatmill.data.bench.stream
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from chatmill.config import ConfigError

from .packing.division import ring_bounds, stripe_bounds
from .packing.mixture import Mixture
from .packing.options import StreamOptions
from .packing.order import DialogueSource
from .packing.prefetch import Prefetcher
from .packing.schedule import Position, Schedule, StepPlan
from .preference import joint

IGNORE = -100
ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Division:
    """One rank's stripe of a batch: tokens rank, rank + ranks, rank + 2 ranks ... of its T (packing/division.py).

    cu_seqlens Int32["S+1"]: of the whole batch, 0 .. T. ring: bounds of each step of ring attention, Int32 on the host.
    """

    rank: int
    ranks: int
    cu_seqlens: Tensor
    ring: tuple[Tensor, ...]


@dataclass(frozen=True)
class PackedBatch:
    """micro_batch packs of one rank, end to end: T = micro_batch x sequence_length tokens, S segments.

    tokens Int32["T"], padding is 0. targets Int64["T"]: the token after tokens[t] in the same dialogue where it is supervised,
    else -100. positions Int32["T"]: restart at 0 in every segment. cu_seqlens Int32["S+1"]: 0 .. T; padding, at the end of a
    pack, is a segment of its own. rows Int32["R"]: where targets != -100, then -1 up to a multiple of 128.
    loss_tokens, n_tokens: of this batch, without padding. step_loss_tokens, step_tokens: of the whole step, all ranks and all
    accumulation. uids: dialogues in order. tile_maps: what `annotate` made of cu_seqlens. position: of the stream, after
    the batch.
    division: this is one rank's stripe of the batch. T is then its own tokens, rows and cu_seqlens are places among them (a
    segment may have none), loss_tokens and n_tokens count them; uids, pairs, max_seqlen and tile_maps are of the whole batch.
    pairs Int64["P 2"], of a data set of preference pairs: segments of the chosen and of the rejected dialogue, which are one in
    `uids`; step_pairs: of the whole step.
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
    tile_maps: Any = None
    position: Position | None = None
    pairs: Tensor | None = None
    step_pairs: int = 0
    division: Division | None = None

    @property
    def examples(self) -> int:
        """What the loss is a mean over, in this batch: pairs, or supervised tokens."""
        return self.loss_tokens if self.pairs is None else len(self.pairs)

    @property
    def step_examples(self) -> int:
        """What the loss is a mean over, in the whole step."""
        return self.step_loss_tokens if self.pairs is None else self.step_pairs

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The batch with its tensors, and its tile maps where they can, on `device`."""
        move = getattr(self.tile_maps, "to", None)
        tile_maps = move(device, non_blocking=non_blocking) if callable(move) else self.tile_maps
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking), tile_maps)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, for copies that overlap with computation."""
        pin = getattr(self.tile_maps, "pin_memory", None)
        return self._map(lambda tensor: tensor.pin_memory(), pin() if callable(pin) else self.tile_maps)

    def _map(self, change: Callable[[Tensor], Tensor], tile_maps: Any) -> PackedBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.division is not None:
            values["division"] = replace(self.division, cu_seqlens=change(self.division.cu_seqlens))
        return PackedBatch(**values | {"tile_maps": tile_maps})


class PackedStream(IterableDataset[PackedBatch]):
    """The batches of one rank, for ever or for `epochs`.

    dataset: token shards, anything that looks like `order.DialogueSource`, or a `Mixture` of several.
    options: a `StreamOptions`, or its fields as keywords, or both: then the keywords replace fields of it.
    shuffle=False, epochs=1: evaluation; every dialogue exactly once over all ranks. The last step is filled up with fully
    masked packs, so that all ranks take the same number of steps. A global_batch below world_size x micro_batch x accumulation
    fills every step up so: any world size can then continue any run.

    Padding waste of a step is 1 - step_tokens / (global_batch x sequence_length), its share of supervised tokens
    step_loss_tokens / step_tokens. counts: dialogues of the windows planned so far: seen, overlong, truncated, split, dropped.

    A torch IterableDataset: DataLoader(stream, batch_size=None, num_workers=n) gives the same batches in the same order.
    """

    def __init__(self, dataset: DialogueSource | Mixture, options: StreamOptions | None = None, **keywords: Any) -> None:
        self.dataset = dataset
        self.options = StreamOptions(**keywords) if options is None else replace(options, **keywords)
        packs, slots = self.options.packs, self.options.slots
        if packs > slots:
            raise ConfigError(
                f"data.stream: global_batch={packs}: expected 1..{slots} (world_size x micro_batch x accumulation)."
            )
        if dataset.vocab_size > 1 << 31:
            raise ConfigError(f"data.stream: vocab_size={dataset.vocab_size}: token ids must fit Int32.")
        mixture = Mixture.of(dataset)
        self.preference = _holds_pairs(mixture)
        if self.preference and self.options.overlong != "drop":
            raise ConfigError(
                f"data.stream: overlong={self.options.overlong!r}: half a preference pair teaches nothing.\n"
                "Set data.overlong=drop."
            )
        self.schedule = Schedule(mixture, self.options)
        self._position = self.schedule.start
        self._ended = False
        self._base: int | None = None  # of a loader worker: number of the batch that worker 0 gave first
        self._device: int | None = None  # GPU of the thread that iterates, where batches are pinned
        length = self.options.sequence_length
        self._ramp = np.arange(self.options.micro_batch * length, dtype=np.int32)
        self._padding = np.zeros(length, np.uint16), np.zeros(length, np.bool_)

    @property
    def counts(self) -> Counter[str]:
        """Dialogues of the windows planned so far, by what became of them."""
        return self.schedule.counts

    def state_dict(self, after: PackedBatch | None = None) -> dict[str, Any]:
        """Position after the last batch handed out, as plain integers and strings: the same on every rank.

        after: the position after this batch instead. With the worker processes of a DataLoader the stream of the main process
        hands nothing out itself; such a state can be continued with any number of workers.
        """
        position = self._position if after is None or after.position is None else after.position
        state = self.schedule.state(position)
        if position.micro:  # inside a step the division of the work matters
            state["layout"] = self._layout()
        if self._base is not None and after is None:  # in a loader worker: whose turn it is
            state["base"] = self._base
        return state

    def _layout(self) -> list[int]:
        return [self.options.world_size, self.options.micro_batch, self.options.accumulation]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state_dict. Raises ConfigError naming the first field in which this stream is another one."""
        position = self.schedule.position(state)
        layout = self._layout()
        if position.micro and list(state.get("layout", ())) != layout:
            raise ConfigError(
                "data.stream: cannot resume inside a step with another layout: [world_size, micro_batch, accumulation] was "
                f"{state.get('layout')}, is {layout}.\nSave at the end of a step, or resume with the same layout."
            )
        self._position, self._ended = position, False
        self._base = state.get("base")

    def exclude(self, step: int, uids: Collection[str]) -> None:
        """Leave dialogues out once `step` steps are done; holds for the next iteration. The past is refused (ConfigError).

        To leave out what came after a saved position: load_state_dict(state), then exclude(state["step"], uids).
        """
        done = self._position.step + bool(self._position.micro)
        if step < done:
            raise ConfigError(
                f"data.stream: cannot exclude from step {step} on: {done} steps are done, and the past cannot change.\n"
                f"Exclude from step {done} on, or load the state of an earlier step first."
            )
        self.schedule.exclude(step, uids)

    def uids_between(self, state: Mapping[str, Any], first: int, last: int) -> list[str]:
        """The dialogues of steps first .. last, counted from 1 as in metrics.jsonl; `state` was saved before them."""
        out: list[str] = []
        for planned in self.schedule.steps(self.schedule.position(state)):
            if planned.step >= last:
                break
            if planned.step >= first - 1:
                out += [uid for pack in planned.packs for uid in pack.uids()]
        return out

    def __iter__(self) -> Iterator[PackedBatch]:
        """Batches from the present position on; once a pass has ended, from the beginning."""
        if self._ended:
            self._position, self._ended, self._base = self.schedule.start, False, None
        self._device = torch.cuda.current_device() if self.options.pin and torch.cuda.is_available() else None
        batches = self._batches(self._position)
        ahead = self.options.prefetch if torch.utils.data.get_worker_info() is None else 0
        with Prefetcher(batches, ahead) as ready:
            for batch in ready:
                assert batch.position is not None
                self._position = batch.position
                yield batch
        self._ended = True

    def _batches(self, position: Position) -> Iterator[PackedBatch]:
        """Every batch of this rank."""
        if self._device is not None:  # in the prefetch thread: page-locking would open a context on GPU 0 for every rank
            torch.cuda.set_device(self._device)
        worker = torch.utils.data.get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        accumulation = self.options.accumulation
        first = position.step * accumulation + position.micro
        if worker is not None and self._base is None:
            self._base = first
        base = first if self._base is None else self._base
        for planned in self.schedule.steps(position):
            for micro in range(position.micro if planned.step == position.step else 0, accumulation):
                if (planned.step * accumulation + micro - base) % turns == turn:  # loader workers take turns
                    yield self._assemble(planned, micro)

    def _assemble(self, planned: StepPlan, micro: int) -> PackedBatch:
        """One micro-batch of this rank; where the step has no more packs, padding."""
        options = self.options
        T = options.micro_batch * options.sequence_length
        first = (micro * options.world_size + options.rank) * options.micro_batch
        packs = planned.packs[first : first + options.micro_batch]
        ids: list[NDArray[Any]] = []
        masks: list[NDArray[np.bool_]] = []
        uids: list[str] = []
        pairs: list[tuple[int, int]] = []
        padding: list[int] = []  # segments
        contexts: list[tuple[int, int]] = []  # segment, leading tokens of it that carry no loss
        for k in range(options.micro_batch):
            room = options.sequence_length
            if k < len(packs):
                read = packs[k].window.block
                for block, local, offset, length, context in packs[k].pieces():
                    data, stop = read(block), offset + length
                    if context:
                        contexts.append((len(ids), context))
                    if self.preference:  # one dialogue, two segments
                        cut = offset + joint(data.loss_mask[offset:stop])
                        pairs.append((len(ids), len(ids) + 1))
                        ids.append(data.ids[offset:cut])
                        masks.append(data.loss_mask[offset:cut])
                        offset = cut
                    ids.append(data.ids[offset:stop])
                    masks.append(data.loss_mask[offset:stop])
                    uids.append(data.uids[local])
                    room -= length
            if room:
                padding.append(len(ids))
                ids.append(self._padding[0][:room])
                masks.append(self._padding[1][:room])
        tokens = np.zeros(T + 1, np.int32)  # one more, so that every token has a next
        supervised = np.zeros(T + 1, np.bool_)
        # One call for all pieces: slice by slice the copies took twice as long.
        np.concatenate(ids, out=tokens[:T], casting="same_kind")
        np.concatenate(masks, out=supervised[:T])
        lengths = np.array([len(piece) for piece in ids], np.int32)
        cu_seqlens = np.zeros(len(ids) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        starts = cu_seqlens[:-1]
        supervised[starts] = False  # the first token of a segment has nothing to be predicted from
        for segment, context in contexts:
            supervised[starts[segment] : starts[segment] + context] = False
        targets = np.full(T, IGNORE, np.int64)
        np.copyto(targets, tokens[1:], where=supervised[1:])
        valid = self._ramp[supervised[1:]]
        loss = sum(pack.loss_tokens for pack in packs)
        if len(valid) != loss:
            raise ConfigError(
                f"data.stream: the index promises {loss} supervised tokens in dialogues {uids[:3]}..., found {len(valid)}.\n"
                "Shards and index do not belong together: run `chatmill data verify`, then build the data set again."
            )
        batch = PackedBatch(
            tokens=torch.from_numpy(tokens[:T]),
            targets=torch.from_numpy(targets),
            positions=torch.from_numpy(self._ramp - np.repeat(starts, lengths)),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            rows=padded_rows(valid),
            max_seqlen=int(lengths.max()),
            loss_tokens=loss,
            n_tokens=sum(pack.tokens for pack in packs),
            step_loss_tokens=planned.loss_tokens,
            step_tokens=planned.tokens,
            uids=tuple(uids),
            tile_maps=options.annotate(cu_seqlens, T) if options.annotate is not None else None,
            pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2) if self.preference else None,
            step_pairs=sum(pack.count for pack in planned.packs) if self.preference else 0,
            position=planned.end if micro + 1 == options.accumulation else replace(planned.start, micro=micro + 1),
        )
        if options.context > 1:
            batch = divided(batch, options.context_rank, options.context, padding)
        return batch.pin_memory() if self._device is not None else batch


def padded_rows(valid: NDArray[np.int32]) -> Tensor:
    """PackedBatch.rows of these tokens."""
    rows = np.full(max(ROW_MULTIPLE, -(-len(valid) // ROW_MULTIPLE) * ROW_MULTIPLE), -1, np.int32)
    rows[: len(valid)] = valid
    return torch.from_numpy(rows)


def divided(batch: PackedBatch, rank: int, ranks: int, padding: Collection[int] = ()) -> PackedBatch:
    """The stripe of one of several ranks that share a whole batch (on the host). padding: its segments without a dialogue."""
    whole = batch.cu_seqlens.numpy()
    bounds = stripe_bounds(whole, rank, ranks)
    targets, positions = batch.targets[rank::ranks].contiguous(), batch.positions[rank::ranks].contiguous()
    valid = np.flatnonzero(targets.numpy() != IGNORE).astype(np.int32)
    steps = ring_bounds(positions.numpy(), ranks)
    return replace(
        batch,
        tokens=batch.tokens[rank::ranks].contiguous(),
        targets=targets,
        positions=positions,
        cu_seqlens=torch.from_numpy(bounds),
        rows=padded_rows(valid),
        loss_tokens=len(valid),
        n_tokens=len(targets) - sum(int(bounds[segment + 1] - bounds[segment]) for segment in padding),
        division=Division(rank, ranks, batch.cu_seqlens, tuple(torch.from_numpy(step) for step in steps)),
    )


def _holds_pairs(mixture: Mixture) -> bool:
    """Whether the dialogues are preference pairs; ConfigError where some data sets hold pairs and others do not."""
    kinds = {name: bool(getattr(source, "preference", False)) for name, source in mixture.sources.items()}
    if len(set(kinds.values())) > 1:
        raise ConfigError(
            f"data.mix: {', '.join(n for n, p in kinds.items() if p)} hold preference pairs, "
            f"{', '.join(n for n, p in kinds.items() if not p)} do not.\nTrain on one kind at a time."
        )
    return any(kinds.values())
