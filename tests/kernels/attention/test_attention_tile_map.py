"""Tile maps against a brute-force mask: nothing seen is missed, nothing unmasked is hidden, nothing empty is visited."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chatmill.kernels.attention.tile_map import (
    END,
    FULL,
    HIGH,
    LEAD,
    LOW,
    PAD,
    START,
    STEPS,
    TAIL,
    list_tiles,
    visible_intervals,
)


def seen_pairs(bounds: list[int], T: int, causal: bool, window: int | None) -> np.ndarray:
    ids = np.full(T, -1)
    for i, (a, b) in enumerate(pairwise(bounds)):
        ids[a:b] = i
    rows, columns = np.arange(T)[:, None], np.arange(T)[None]
    seen = (ids[:, None] == ids[None]) & (ids[:, None] >= 0)
    if causal:
        seen &= columns <= rows
    if window:
        seen &= abs(rows - columns) < window
    return seen


def check(bounds: list[int], T: int, block: int, step: int, causal: bool, window: int | None, side: str) -> None:
    seen = seen_pairs(bounds, T, causal, window)
    if side == "key":
        seen = seen.T  # rows of a tile first
    tiles = list_tiles(np.array(bounds), block, step, window, causal=causal, side=side, T=T)
    owner, covered = np.zeros(T, dtype=int), np.zeros_like(seen)
    for tile in tiles:
        s, e, low, high = (int(tile[c]) for c in (START, END, LOW, HIGH))
        owner[s:e] += 1
        assert e - s <= block
        assert tile[STEPS] == tile[LEAD] + tile[FULL] + tile[TAIL]
        for i in range(tile[STEPS]):
            n = low + i * step
            reached = slice(n, min(n + step, high))
            assert reached.stop > reached.start
            covered[s:e, reached] = True
            if tile[LEAD] <= i < tile[LEAD] + tile[FULL]:
                assert seen[s:e, reached].all(), "an unmasked step hides a pair"
                if side == "query":
                    assert n + step <= high, "an unmasked step leaves the interval"
    assert (owner == 1).all(), "every row belongs to one tile"
    assert not (seen & ~covered).any(), "a seen pair is not visited"
    assert len(tiles) % PAD == 0
    assert (np.diff(tiles[:, STEPS]) <= 0).all(), "longest first"


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    outside=st.integers(0, 9),
    block=st.sampled_from([8, 16]),
    step=st.sampled_from([4, 8, 16]),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 30)),
    side=st.sampled_from(["query", "key"]),
)
def test_a_plan_covers_exactly_what_is_seen(lengths, outside, block, step, causal, window, side) -> None:
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    check(bounds, bounds[-1] + outside, block, step, causal, window, side)


def visited_pairs(tiles: NDArray[np.int32], block: int, step: int) -> int:
    """Pairs (query, key) that are computed, masked ones included: the measure of waste."""
    return int(tiles[:, STEPS].astype(np.int64).sum()) * block * step


def test_one_long_document_masks_only_the_diagonal() -> None:
    tiles = list_tiles(np.array([0, 1024]), 128, 64)
    tiles = tiles[tiles[:, END] > 0]
    assert (tiles[:, LEAD] == 0).all()
    assert (tiles[:, TAIL] == 2).all()
    assert sorted(tiles[:, FULL]) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert visited_pairs(tiles, 128, 64) == 128 * 64 * (2 + 4 + 6 + 8 + 10 + 12 + 14 + 16)


def test_steps_start_with_the_document_not_with_the_memory() -> None:
    tiles = list_tiles(np.array([0, 1000, 1000 + 256]), 128, 64)
    second = tiles[tiles[:, START] >= 1000]
    assert sorted(second[:, START]) == [1000, 1128]
    assert (second[:, LOW] == 1000).all()
    assert second[:, STEPS].sum() == 2 + 4


@pytest.mark.parametrize(("longest", "bound"), [(40, 0.5), (200, 0.96)])
def test_short_chats_share_tiles(longest: int, bound: float) -> None:
    bounds = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(longest // 10, longest, 80))])
    alone = sum(visited_pairs(list_tiles(np.array([0, n]), 128, 64), 128, 64) for n in np.diff(bounds))
    assert visited_pairs(list_tiles(bounds, 128, 64), 128, 64) < bound * alone


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_visible_intervals_are_the_mask(causal: bool, window: int | None) -> None:
    bounds, T = [0, 2, 2, 9], 11
    seen = seen_pairs(bounds, T, causal, window)
    intervals = visible_intervals(np.array(bounds), T, window, causal=causal)
    columns = np.arange(T)[None]
    assert np.array_equal((columns >= intervals[0][:, None]) & (columns < intervals[1][:, None]), seen)
    assert np.array_equal((columns >= intervals[2][:, None]) & (columns < intervals[3][:, None]), seen.T)


@pytest.mark.parametrize("bad", [[1, 5], [0, 5, 3], [0, 9], [0]])
def test_bad_boundaries_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        list_tiles(np.array(bad), 8, 8, T=8)
