"""Data sets and streams that the tests of the packed stream share: small, of several windows, alone and mixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from chatmill.data.packing.mixture import Mixture
from chatmill.data.packing.order import Order
from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.stream import PackedBatch, PackedStream

SOURCE = MemoryDataset.random(700, mean=40, longest=300, block=16)
LENGTH = 128


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> Iterator[None]:
    """Several windows per epoch, as in data sets of a real size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatmill.data.packing.order.WINDOW_DIALOGUES", 130)
        patch.setattr("chatmill.data.packing.order.WINDOW_PACKS", 1)
        assert Order.of(SOURCE, capacity=128, seed=0, shuffle=True).windows == 5
        yield


def stream(source: Any = SOURCE, **options: Any) -> PackedStream:
    return PackedStream(source, **{"sequence_length": LENGTH, "prefetch": 0, **options})


def rows_of(batch: PackedBatch, length: int = LENGTH) -> list[bytes]:
    """Each pack of a batch as bytes: tokens, targets, positions."""
    parts = [np.asarray(getattr(batch, name)).reshape(-1, length) for name in ("tokens", "targets", "positions")]
    return [b"".join(part[k].tobytes() for part in parts) for k in range(len(parts[0]))]


def mixture() -> Mixture:
    """Two data sets, a third from step 20 on."""
    sources = {name: MemoryDataset.random(n, mean=40, longest=300, block=16, seed=n, name=name) for name, n in SIZES.items()}
    return Mixture(sources, {0: {"a": 3, "b": 1}, 20: {"a": 1, "b": 1, "c": 1}})


SIZES = {"a": 300, "b": 200, "c": 90}
MIXED: dict[str, Any] = {"exclude": {9: [f"a{i:07d}" for i in range(80)], 31: [f"b{i:07d}" for i in range(50)]}}
