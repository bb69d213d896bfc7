"""The global order: pure, complete, and different where it should differ."""

from __future__ import annotations

import numpy as np
import pytest

from chatmill.config import ConfigError
from chatmill.data.packing.order import Order, permutation, shuffle_keys
from chatmill.data.shards.memory import MemoryDataset

U64 = (1 << 64) - 1
FROZEN = [6, 5, 4, 3, 0, 7, 1, 2]


def test_shuffle_keys_are_those_of_splitmix64_in_plain_integers() -> None:
    import hashlib

    state = int.from_bytes(hashlib.blake2b(b"blocks\x1f7\x1f2", digest_size=8).digest(), "little")
    expected = []
    for _ in range(50):
        state = (state + 0x9E3779B97F4A7C15) & U64
        x = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & U64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & U64
        expected.append(x ^ (x >> 31))
    assert shuffle_keys(50, "blocks", 7, 2).tolist() == expected


def test_the_order_is_frozen_so_that_old_runs_can_be_continued() -> None:
    assert permutation(8, "blocks", 0, 0, "fingerprint").tolist() == FROZEN


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"fingerprint": "y"}])
def test_another_seed_epoch_or_data_set_gives_another_order(change: dict[str, object]) -> None:
    parts: dict[str, object] = {"seed": 0, "epoch": 0, "fingerprint": "x"}
    first, second = (permutation(1000, *(parts | extra).values()) for extra in ({}, change))
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(second), np.arange(1000))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_windows_of_an_epoch_hold_every_block_once_and_are_of_even_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatmill.data.packing.order.WINDOW_DIALOGUES", 300)
    monkeypatch.setattr("chatmill.data.packing.order.WINDOW_PACKS", 1)
    source = MemoryDataset.random(1000, mean=20, block=10)
    order = Order.of(source, capacity=64, seed=0, shuffle=True)
    assert order.windows == 3
    for epoch in range(3):
        windows = [order.blocks(epoch, window) for window in range(order.windows)]
        assert sorted(np.concatenate(windows).tolist()) == list(range(100))
        assert {len(window) for window in windows} <= {33, 34}
    plain = Order.of(source, capacity=64, seed=0, shuffle=False)
    assert np.concatenate([plain.blocks(0, window) for window in range(3)]).tolist() == list(range(100))


def test_max_dialogues_cuts_inside_a_block() -> None:
    source = MemoryDataset.random(100, block=8)
    order = Order.of(source, capacity=64, seed=0, shuffle=True, max_dialogues=20)
    assert order.dialogues == 20 and order.block_starts.tolist() == [0, 8, 16, 20]


def test_an_empty_data_set_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="holds no dialogue"):
        Order.of(MemoryDataset([]), capacity=64, seed=0, shuffle=True)
