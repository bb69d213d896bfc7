"""Batches that several ranks divide: stripes of the same global batches, with balanced attention, at any layout."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from tests.data.stream_cases import SOURCE, small_windows, stream

from chatmill.config import ConfigError
from chatmill.data.importers.datasets.chitchat import installed_file, read
from chatmill.data.ledger import Ledger
from chatmill.data.packing.division import attended_pairs, ring_bounds, stripe_bounds
from chatmill.data.recipe import SourceSection
from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.stream import IGNORE, PackedBatch

__all__ = ["small_windows"]  # a fixture of this module

NAMES = ("tokens", "targets", "positions")
LAYOUTS = [(1, 1, 4, 1), (4, 1, 1, 1), (1, 2, 4, 1), (2, 2, 1, 2), (1, 4, 2, 2), (2, 4, 2, 1)]  # groups, context, micro, accum


def whole_steps(steps: int, layout: tuple[int, int, int, int], state: Any = None) -> tuple[list[list[bytes]], dict[str, Any]]:
    """Every step's packs in global order, put together from the stripes of all ranks, and the state afterwards."""
    groups, context, micro, accumulation = layout
    parts: dict[tuple[int, int], list[PackedBatch]] = {}
    states = []
    for group in range(groups):
        for rank in range(context):
            place = {"rank": group, "world_size": groups, "context": context, "context_rank": rank}
            ranked = stream(micro_batch=micro, accumulation=accumulation, seed=3, **place)
            if state is not None:
                ranked.load_state_dict(state)
            for number, batch in enumerate(islice(ranked, steps * accumulation)):
                parts.setdefault((number, group), []).append(batch)
            states.append(ranked.state_dict())
    assert all(found == states[0] for found in states)
    out: list[list[bytes]] = [[] for _ in range(steps)]
    for (number, _), batches in sorted(parts.items()):
        arrays = [np.stack([np.asarray(getattr(batch, name)) for batch in batches], 1).reshape(micro, -1) for name in NAMES]
        out[number // accumulation] += [b"".join(array[k].tobytes() for array in arrays) for k in range(micro)]
    return out, states[0]


def test_stripes_of_every_layout_make_up_the_same_global_batches_and_continue_each_other() -> None:
    expected, _ = whole_steps(6, LAYOUTS[0])
    for first, second in pairwise([*LAYOUTS[1:], LAYOUTS[0]]):
        begun, state = whole_steps(2, first)
        continued, _ = whole_steps(4, second, state)
        assert begun + continued == expected


def test_a_stripe_knows_its_own_tokens_and_targets() -> None:
    whole = next(iter(stream(micro_batch=2, seed=1)))
    parts = [next(iter(stream(micro_batch=2, seed=1, context=4, context_rank=rank))) for rank in range(4)]
    assert sum(part.loss_tokens for part in parts) == whole.loss_tokens
    assert sum(part.n_tokens for part in parts) == whole.n_tokens < 256
    for rank, part in enumerate(parts):
        assert part.division is not None
        assert (part.division.rank, part.division.ranks) == (rank, 4)
        assert part.division.cu_seqlens.tolist() == whole.cu_seqlens.tolist()
        assert (part.uids, part.max_seqlen, part.step_loss_tokens) == (whole.uids, whole.max_seqlen, whole.step_loss_tokens)
        assert part.targets.tolist() == whole.targets[rank::4].tolist()  # shifted before the division
        valid = part.rows[part.rows >= 0]
        assert valid.tolist() == (part.targets != IGNORE).nonzero().flatten().tolist()
        assert len(part.rows) % 128 == 0
        for (low, high), (a, b) in zip(pairwise(whole.cu_seqlens.tolist()), pairwise(part.cu_seqlens.tolist()), strict=True):
            assert part.tokens[a:b].tolist() == whole.tokens[[t for t in range(low, high) if t % 4 == rank]].tolist()


def test_every_pair_of_a_query_and_a_key_it_sees_comes_once_around_the_ring() -> None:
    lengths = [1, 1, 5, 2, 9, 1, 1, 1, 17, 3, 7, 16]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    T, ranks = int(bounds[-1]), 4
    positions = np.arange(T, dtype=np.int32) - np.repeat(bounds[:-1], lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen = np.zeros((T, T), int)
    for rank in range(ranks):
        own = positions[rank::ranks]
        for step, edges in enumerate(ring_bounds(own, ranks)):
            assert edges[0] == 0
            assert edges[-1] == T // ranks
            for a, b in pairwise(edges.tolist()):
                for query in range(a, b):
                    if own[query] >= step:
                        keys = ranks * np.arange(a, query + 1) + rank - step
                        seen[ranks * query + rank, keys] += 1
    t = np.arange(T)
    assert np.array_equal(seen, (document[:, None] == document) & (t <= t[:, None]))
    assert stripe_bounds(bounds, 3, 4)[-1] == T // 4
    assert attended_pairs(bounds, ranks).tolist() == [int(seen[rank::ranks].sum()) for rank in range(ranks)]


def chitchat_lengths() -> list[int]:
    """Tokens of the installed chats, at four characters each."""
    pytest.importorskip("chitchat_dataset")
    chats = islice(read(installed_file(), SourceSection(format="chitchat"), "chitchat", Ledger()), 300)
    return [4 * len(chat.turns) + sum(len(turn.content) for turn in chat.turns) // 4 for chat in chats]


def heavy_tail() -> list[int]:
    """A Pareto distribution with exponent 1: half below 120 tokens, some of a whole pack of 16,384."""
    return np.minimum(16_384, np.random.default_rng(0).pareto(1.0, 700) * 60 + 1).astype(int).tolist()


@pytest.mark.parametrize(("make", "length"), [(chitchat_lengths, 2048), (heavy_tail, 16_384)])
def test_attended_pairs_of_eight_ranks_differ_by_less_than_five_percent(make: Any, length: int) -> None:
    masks = [np.arange(max(2, n)) > 0 for n in make()]
    data = MemoryDataset([(f"d{i}", np.ones(len(mask), int), mask) for i, mask in enumerate(masks)], vocab_size=2)
    worst, cut = 0.0, 0.0
    for batch in islice(stream(data, sequence_length=length, epochs=1), 20):
        bounds = batch.cu_seqlens.numpy()
        pairs = attended_pairs(bounds, 8)
        worst = max(worst, float(pairs.max() / pairs.mean() - 1), float(1 - pairs.min() / pairs.mean()))
        pieces = attended_pairs(bounds, length).reshape(8, -1).sum(1)  # pairs of each token, in eight contiguous pieces
        cut = max(cut, float(pieces.max() / pieces.mean() - 1))
    assert worst < 0.05
    assert cut > 0.5  # what dividing the tokens alone would give


def test_a_division_that_does_not_go_out_even_is_refused() -> None:
    with pytest.raises(ConfigError, match="context=3 does not divide the 1 x 128 tokens of a batch"):
        stream(SOURCE, context=3)
    with pytest.raises(ConfigError, match=r"context_rank=2: expected 0\.\.1"):
        stream(SOURCE, context=2, context_rank=2)
