"""Best-fit-decreasing packing of dialogues into packs of a fixed number of tokens, one window at a time.

    pack_best_fit(lengths, capacity) -> pack of every length
    plan_window(source, order, epoch, window, ...) -> WindowPlan: which piece of which dialogue lies in which pack

Dialogues are never split to fill a pack. One that is longer than a pack is, as `overlong` says, cut at whole turns
(`truncate`), continued in further pieces that repeat some context (`split`), or left out (`drop`). Integers only: the plan
of a window is the same on every rank, and so are the global token counts read from it.

Method: Johnson et al. 1974 (best fit decreasing); equal lengths are placed together and free room is found in a two-level
bitset, so that the cost per dialogue is well under a microsecond where lengths repeat.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .order import DialogueSource, Order

Overlong = Literal["truncate", "split", "drop"]


def pack_best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Pack of every length, and the number of packs. lengths (N,) must fall monotonically and lie in 1..capacity.

    Best fit: each item goes to the pack with the least room that still takes it, to a new pack where none does.
    """
    if len(lengths) == 0:
        return np.zeros(0, np.int64), 0
    if lengths[0] > capacity or lengths[-1] < 1 or np.any(np.diff(lengths) > 0):
        raise ValueError(f"data.pack: expected falling lengths in 1..{capacity}, got {lengths.max()} .. {lengths.min()}")
    starts = np.flatnonzero(np.r_[True, lengths[1:] != lengths[:-1]])
    packs_with: defaultdict[int, list[int]] = defaultdict(list)  # packs by free room
    low = [0] * ((capacity >> 9) + 1)  # bit r & 511 of low[r >> 9]: some pack has room r
    high = 0  # bit j: low[j] != 0
    placed: list[int] = []
    packs = 0
    for length, count in zip(lengths[starts].tolist(), np.diff(np.r_[starts, len(lengths)]).tolist(), strict=True):
        while count:
            word = length >> 9
            bits = low[word] >> (length & 511)
            if bits:
                room = length + (bits & -bits).bit_length() - 1
            else:
                bits = high >> (word + 1)
                if bits:
                    word += (bits & -bits).bit_length()
                    room = (word << 9) + (low[word] & -low[word]).bit_length() - 1
                else:
                    # New packs for what is left of this length, through the same code as old ones.
                    room = capacity
                    word = room >> 9
                    fresh = -(-count // (capacity // length))
                    packs_with[room] = list(range(packs, packs + fresh))
                    packs += fresh
                    low[word] |= 1 << (room & 511)
                    high |= 1 << word
            here = packs_with[room]
            each = room // length
            full = min(count // each, len(here))
            if full:
                taken = here[-full:]
                del here[-full:]
                placed.extend(taken if each == 1 else taken * each)
                count -= full * each
                rest = room - each * length
                if rest:
                    packs_with[rest].extend(taken)
                    low[rest >> 9] |= 1 << (rest & 511)
                    high |= 1 << (rest >> 9)
            if count and here:  # fewer than `each` are left: one more pack takes them
                taken_last = here.pop()
                placed.extend([taken_last] * count)
                rest = room - count * length
                count = 0
                if rest:
                    packs_with[rest].append(taken_last)
                    low[rest >> 9] |= 1 << (rest & 511)
                    high |= 1 << (rest >> 9)
            if not here:
                low[word] &= ~(1 << (room & 511))
                if not low[word]:
                    high &= ~(1 << word)
    return np.asarray(placed, dtype=np.int64), packs


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, start + length) of a dialogue; the first `context` of them carry no loss.

    whole: the piece ends where a supervised turn ends.
    """

    start: int
    length: int
    context: int
    loss_tokens: int
    whole: bool


def fit_overlong(loss_mask: NDArray[np.bool_], capacity: int, overlong: Overlong, overlap: int = 0) -> list[Piece]:
    """The pieces kept of a dialogue longer than `capacity` tokens.

    loss_mask: Bool["L"]. truncate: one piece, up to the end of the last supervised turn that fits whole; where not even the
    first one does, `capacity` tokens. split: further pieces, each starting `overlap` tokens before the end of the last.
    Pieces without a supervised token are left out, so the result may be empty.
    """
    if overlong == "drop":
        return []
    if overlong == "truncate":
        head = loss_mask[: capacity + 1]
        turn_ends = np.flatnonzero(head[:-1] > head[1:])
        stop = int(turn_ends[-1]) + 1 if len(turn_ends) else capacity
        loss = int(np.count_nonzero(head[1:stop]))
        return [Piece(0, stop, 0, loss, bool(len(turn_ends)))] if loss else []
    total = len(loss_mask)
    ends = np.flatnonzero(loss_mask & ~np.r_[loss_mask[1:], False]) + 1  # just after each supervised stretch
    pieces: list[Piece] = []
    done = 0  # supervised tokens before this are dealt with
    while done < total:
        start = max(0, done - overlap)
        context = done - start
        fitting = ends[(ends > done) & (ends <= start + capacity)]
        if not np.any(loss_mask[done:]):
            break
        stop = int(fitting[-1]) if len(fitting) else min(total, start + capacity)
        # The first token of a piece has nothing before it to be predicted from.
        loss = int(np.count_nonzero(loss_mask[max(done, start + 1) : stop]))
        if loss:
            pieces.append(Piece(start, stop - start, context, loss, bool(len(fitting))))
        done = stop
    return pieces


@dataclass(frozen=True)
class WindowPlan:
    """Packs of one window. U pieces in pack order, P packs; pack p holds pieces pack_starts[p] : pack_starts[p + 1].

    dialogue: index in the data set. block: its block. local: its place in the block. offset: first token of the piece in the
    block. context: leading tokens that carry no loss (only pieces of split dialogues have any).
    counts: dialogues seen; of them empty, excluded, overlong; of these truncated, split, dropped, and cut inside a turn.
    """

    dialogue: NDArray[np.int64]
    block: NDArray[np.int64]
    local: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    context: NDArray[np.int64]
    loss: NDArray[np.int64]
    pack_starts: NDArray[np.int64]
    pack_tokens: NDArray[np.int64]
    pack_loss: NDArray[np.int64]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def packs(self) -> int:
        """Number of packs."""
        return len(self.pack_starts) - 1


def plan_window(
    source: DialogueSource,
    order: Order,
    epoch: int,
    window: int,
    *,
    capacity: int,
    overlong: Overlong = "truncate",
    overlap: int = 0,
    loss_mask_of: Callable[[int, int], NDArray[np.bool_]] | None = None,
    excluded: Collection[int] = (),
) -> WindowPlan:
    """Plan a window: its dialogues without the excluded ones, the overlong cut, packed, packs permuted.

    loss_mask_of(block, place in block): the loss mask of an overlong dialogue; read from the source when not given.
    """
    blocks = order.blocks(epoch, window)
    firsts = order.block_starts[blocks]
    sizes = order.block_starts[blocks + 1] - firsts
    local = np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    dialogue = local + np.repeat(firsts, sizes)
    block = np.repeat(blocks, sizes)
    length = source.lengths[dialogue].astype(np.int64)
    loss = source.loss_tokens[dialogue].astype(np.int64)
    before = np.cumsum(length) - length
    at_block = before[np.cumsum(sizes) - sizes]  # tokens of the window before each block
    offset = before - np.repeat(at_block, sizes)

    keep = length > 0
    counts = {"dialogues": len(dialogue), "empty": int(np.count_nonzero(~keep)), "excluded": 0}
    if excluded:
        out = np.isin(dialogue, np.fromiter(excluded, np.int64, len(excluded)))
        counts["excluded"] = int(np.count_nonzero(out & keep))
        keep &= ~out
    too_long = np.flatnonzero(keep & (length > capacity))
    keep[too_long] = False
    counts |= {"overlong": len(too_long), "truncated": 0, "split": 0, "dropped": 0, "cut_inside_turn": 0}
    columns = [dialogue, block, local, offset, length, np.zeros(len(dialogue), np.int64), loss]
    columns = [column[keep] for column in columns]
    if len(too_long):
        read = loss_mask_of or _mask_reader(source)
        extra: list[tuple[int, ...]] = []
        for i in too_long.tolist():
            pieces = [] if overlong == "drop" else fit_overlong(read(int(block[i]), int(local[i])), capacity, overlong, overlap)
            counts["dropped" if not pieces else "truncated" if len(pieces) == 1 else "split"] += 1
            counts["cut_inside_turn"] += any(not piece.whole for piece in pieces)
            place = (int(dialogue[i]), int(block[i]), int(local[i]))
            extra.extend((*place, int(offset[i]) + p.start, p.length, p.context, p.loss_tokens) for p in pieces)
        if extra:
            rows = np.asarray(extra, dtype=np.int64)
            columns = [np.concatenate([column, rows[:, k]]) for k, column in enumerate(columns)]

    length = columns[4]
    by_length = np.lexsort((order.keys(epoch, window, "dialogues", len(length)), -length))
    pack, packs = pack_best_fit(length[by_length], capacity)
    place_of_pack = np.empty(packs, np.int64)
    place_of_pack[np.argsort(order.keys(epoch, window, "packs", packs), kind="stable")] = np.arange(packs)
    pack = place_of_pack[pack]
    final = by_length[np.argsort(pack, kind="stable")]
    columns = [column[final] for column in columns]
    pack_starts = np.r_[0, np.cumsum(np.bincount(pack, minlength=packs))].astype(np.int64)
    if packs:
        tokens, losses = (np.add.reduceat(columns[k], pack_starts[:-1]) for k in (4, 6))
    else:
        tokens = losses = np.zeros(0, np.int64)
    dialogue, block, local, offset, length, context, loss = columns
    return WindowPlan(dialogue, block, local, offset, length, context, loss, pack_starts, tokens, losses, counts)


def _mask_reader(source: DialogueSource) -> Callable[[int, int], NDArray[np.bool_]]:
    def read(block: int, place: int) -> NDArray[np.bool_]:
        data = source.read_block(block)
        return data.loss_mask[data.offsets[place] : data.offsets[place + 1]]

    return read
