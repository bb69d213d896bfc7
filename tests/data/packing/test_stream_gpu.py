"""Pinned batches on their way to a GPU. Run with the others by `make gpu`."""

from __future__ import annotations

import pytest
import torch

from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.stream import PackedStream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_pinned_batches_reach_the_gpu_unchanged() -> None:
    source = MemoryDataset.random(400, mean=40, longest=300, block=16)
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.cuda.device(device):
        pinned = PackedStream(source, sequence_length=128, micro_batch=4, epochs=2, pin=True, prefetch=3)
        plain = PackedStream(source, sequence_length=128, micro_batch=4, epochs=2, prefetch=0)
        seen = 0
        for batch, expected in zip(pinned, plain, strict=True):
            assert batch.tokens.is_pinned() and batch.rows.is_pinned()
            moved = batch.to(device)
            for name in ("tokens", "targets", "positions", "cu_seqlens", "rows"):
                assert getattr(moved, name).device == device
                assert torch.equal(getattr(moved, name).cpu(), getattr(expected, name))
            seen += 1
        assert seen > 50
