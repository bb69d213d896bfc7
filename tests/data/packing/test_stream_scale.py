"""Ten million dialogues: a run resumes at once, however far it has come, and fills its packs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from chatmill.data.importers.datasets.chitchat import installed_file, read
from chatmill.data.ledger import Ledger
from chatmill.data.packing.mixture import Mixture
from chatmill.data.packing.options import StreamOptions
from chatmill.data.packing.schedule import Cursor, Position, Schedule
from chatmill.data.recipe import SourceSection
from chatmill.data.shards.memory import IndexedDataset
from chatmill.data.stream import PackedStream

COUNT = 10_000_000


@pytest.fixture(scope="module")
def source() -> IndexedDataset:
    return IndexedDataset(COUNT)


def open_stream(source: IndexedDataset) -> PackedStream:
    return PackedStream(source, sequence_length=8192, micro_batch=4, seed=3, prefetch=0)


@pytest.mark.slow
def test_resuming_takes_under_a_second_and_reads_no_more_at_the_end_than_at_the_beginning(source: IndexedDataset) -> None:
    stream = open_stream(source)
    windows = stream.schedule.orders[0].windows
    assert windows > 500
    seconds, reads = {}, {}
    for epoch, window in ((0, 0), (0, windows // 2), (3, windows - 1)):
        position = replace(stream.schedule.start, step=1000, cursors=(Cursor(epoch, window, 40, 990),))
        state = stream.schedule.state(position)
        best = float("inf")
        for _ in range(3):
            source.reads = 0
            began = time.process_time()
            resumed = open_stream(source)
            resumed.load_state_dict(state)
            batch = next(iter(resumed))
            best = min(best, time.process_time() - began)
            reads[window] = source.reads
        seconds[window] = best
        assert batch.n_tokens > 0.99 * 4 * 8192
    print(f"seconds of CPU to resume and give a batch, by window: {seconds}; blocks read: {reads}")
    assert max(seconds.values()) < 1.0
    assert max(reads.values()) <= 33  # the blocks of one window: never what came before
    assert max(seconds.values()) < 5 * seconds[0]


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [2048, 8192, 32768])
def test_packs_of_a_log_normal_data_set_are_at_least_995_per_mille_full(capacity: int) -> None:
    source = IndexedDataset(100_000, longest=2048)
    stream = PackedStream(source, sequence_length=capacity, epochs=1, micro_batch=1)
    plans = list(stream.schedule.steps(Position()))
    fill = sum(plan.tokens for plan in plans) / (len(plans) * capacity)
    print(f"fill at {capacity}: {fill:.5f}")
    assert fill >= 0.995
    assert sum(plan.tokens for plan in plans) == int(source.lengths.sum())


@pytest.mark.slow
@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_packs_of_the_chitchat_set_are_at_least_995_per_mille_full(overlong: Literal["truncate", "drop"]) -> None:
    """Its real lengths, at four characters a token (what SmolLM2's tokenizer makes of it, within a few per cent)."""
    chats = read(installed_file(), SourceSection(format="chitchat"), "chitchat", Ledger())
    lengths = np.array([sum(4 + len(turn.content) // 4 for turn in chat.turns) for chat in chats if len(chat.turns) > 1])
    assert len(lengths) > 3000 and lengths.max() > 8192
    for capacity in (2048, 8192, 32768):
        source = IndexedDataset(len(lengths), block=256)
        source.lengths = np.maximum(lengths, 4).astype(np.uint32)
        source.loss_tokens = source.lengths // 2
        schedule = Schedule(Mixture.of(source), StreamOptions(sequence_length=capacity, epochs=1, overlong=overlong))
        plans = list(schedule.steps())
        fill = sum(plan.tokens for plan in plans) / (len(plans) * capacity)
        print(f"fill at {capacity}: {fill:.5f}; {dict(schedule.counts)}")
        assert fill >= 0.995
