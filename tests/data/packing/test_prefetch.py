"""The prefetch thread: bounded, in order, and gone when nobody listens."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest

from chatmill.data.packing.prefetch import Prefetcher


def threads() -> int:
    return sum(thread.name == "chatmill-prefetch" for thread in threading.enumerate())


def test_items_come_in_order_and_the_producer_stays_only_so_far_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for k in range(50):
            made.append(k)
            yield k

    with Prefetcher(items(), 3) as ready:
        for k, item in enumerate(ready):
            assert item == k
            assert len(made) <= k + 1 + 3 + 1  # handed out, waiting, and the one being made
    assert made == list(range(50)) and threads() == 0


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_an_error_comes_after_the_items_before_it(ahead: int) -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("disk")

    got: list[int] = []
    with pytest.raises(OSError, match="disk"), Prefetcher(items(), ahead) as ready:
        for item in ready:
            got.append(item)
    assert got == [1, 2] and threads() == 0


def test_closing_while_the_producer_waits_or_works_ends_it() -> None:
    def slow() -> Iterator[int]:
        for k in count():
            time.sleep(0.02)
            yield k

    for items in (count(), slow()):
        with Prefetcher(iter(items), 2) as ready:
            assert list(islice(ready, 3)) == [0, 1, 2]
        assert threads() == 0


def test_an_iterator_that_is_thrown_away_takes_its_thread_along() -> None:
    def use() -> Iterator[int]:
        with Prefetcher(count(), 2) as ready:
            yield from ready

    iterator = use()
    assert next(iterator) == 0 and threads() == 1
    del iterator
    gc.collect()
    assert threads() == 0


def test_a_program_that_ends_in_the_middle_of_a_loop_ends_at_once_and_cleanly() -> None:
    program = """
from itertools import islice
from chatmill.data.stream import PackedStream
from chatmill.data.shards.memory import MemoryDataset
batches = iter(PackedStream(MemoryDataset.random(300), sequence_length=512, prefetch=3))
print(len(list(islice(batches, 5))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")
