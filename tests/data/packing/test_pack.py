"""Packing: against a slow best fit, and dialogues cut at whole turns."""

from __future__ import annotations

import numpy as np
import pytest

from chatmill.data.packing.order import Order
from chatmill.data.packing.pack import fit_overlong, pack_best_fit, plan_window
from chatmill.data.shards.memory import MemoryDataset


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left in every pack, by trying all packs for every item."""
    rooms: list[int] = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@pytest.mark.parametrize("capacity", [2, 64, 511, 512, 513, 2048, 5000])
@pytest.mark.parametrize("seed", range(6))
def test_packing_fills_packs_exactly_as_a_slow_best_fit_decreasing_does(capacity: int, seed: int) -> None:
    rng = np.random.default_rng([capacity, seed])
    lengths = np.clip(rng.lognormal(np.log(capacity / 6 + 1), 1.0, 400), 1, capacity).astype(np.int64)
    lengths = -np.sort(-lengths)
    pack, packs = pack_best_fit(lengths, capacity)
    assert len(pack) == len(lengths) and set(pack.tolist()) == set(range(packs))
    used = np.bincount(pack, weights=lengths).astype(int)
    assert used.max() <= capacity
    assert sorted(capacity - used) == sorted(slow_best_fit(lengths.tolist(), capacity))


def test_packing_refuses_lengths_that_do_not_fit_or_do_not_fall() -> None:
    for lengths in ([9, 8], [3, 4], [4, 0]):
        with pytest.raises(ValueError, match="falling lengths"):
            pack_best_fit(np.array(lengths, np.int64), 8)
    assert pack_best_fit(np.zeros(0, np.int64), 8)[1] == 0


@pytest.mark.parametrize("capacity", [2048, 8192, 32768])
def test_log_normal_lengths_fill_packs_to_more_than_995_per_mille(capacity: int) -> None:
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(500) - 0.5, 1.0, 16_384), 8, capacity).astype(np.int64)
    packs = pack_best_fit(-np.sort(-lengths), capacity)[1]
    assert lengths.sum() / (packs * capacity) >= 0.995


def mask(text: str) -> np.ndarray:
    """'.' plain, '#' supervised."""
    return np.array([c == "#" for c in text])


def test_an_overlong_dialogue_ends_where_its_last_whole_supervised_turn_ends() -> None:
    text = "...##...####..###"
    for capacity, length in ((5, 5), (6, 5), (11, 5), (12, 12), (14, 12), (16, 12)):
        (piece,) = fit_overlong(mask(text), capacity, "truncate")
        assert (piece.start, piece.length, piece.context, piece.whole) == (0, length, 0, True)
        assert piece.loss_tokens == text[:length].count("#")


def test_a_first_reply_longer_than_a_pack_is_cut_inside_and_a_prompt_longer_than_a_pack_is_dropped() -> None:
    (piece,) = fit_overlong(mask("..########"), 6, "truncate")
    assert (piece.length, piece.loss_tokens, piece.whole) == (6, 4, False)
    assert fit_overlong(mask("......####"), 6, "truncate") == []
    assert fit_overlong(mask("..##..####"), 6, "drop") == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_split_supervises_every_token_once_but_those_without_context(seed: int, overlap: int) -> None:
    rng = np.random.default_rng(seed)
    loss = rng.random(int(rng.integers(30, 200))) < rng.choice([0.1, 0.5, 0.9])
    loss[0] = False
    seen = np.zeros(len(loss), int)
    for piece in fit_overlong(loss, 16, "split", overlap):
        assert 1 <= piece.length <= 16
        first = max(piece.start + piece.context, piece.start + 1)
        part = np.flatnonzero(loss[first : piece.start + piece.length]) + first
        assert piece.loss_tokens == len(part) > 0
        seen[part] += 1
    assert seen.max(initial=0) <= 1
    assert not seen[~loss].any()
    if overlap:  # every supervised token then has something before it
        assert np.array_equal(seen.astype(bool), loss)


def test_a_window_holds_each_dialogue_once_and_its_counts_add_up() -> None:
    source = MemoryDataset.random(500, mean=60, longest=600)
    order = Order.of(source, capacity=256, seed=3, shuffle=True)
    plan = plan_window(source, order, 0, 0, capacity=256, excluded={7, 11})
    counts = plan.counts
    assert order.windows == 1 and counts["dialogues"] == 500 and counts["excluded"] == 2
    assert counts["overlong"] == counts["truncated"] + counts["dropped"] == int((source.lengths > 256).sum())
    assert len(set(plan.dialogue.tolist())) == len(plan.dialogue) == 500 - 2 - counts["dropped"]
    assert not {7, 11} & set(plan.dialogue.tolist())
    for p in range(plan.packs):
        piece = slice(plan.pack_starts[p], plan.pack_starts[p + 1])
        assert plan.pack_tokens[p] == plan.length[piece].sum() <= 256
        assert plan.pack_loss[p] == plan.loss[piece].sum()
