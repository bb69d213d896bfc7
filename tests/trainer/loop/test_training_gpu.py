"""The trainer on a real GPU: no wait for the host inside a step, replies as on the CPU, a state that comes back.

pytest -m gpu tests/trainer/loop/test_training_gpu.py

The first test runs on a CPU too, where any operation that would make a GPU's host wait is caught as it is dispatched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.kernels.attention import make_tile_map
from chatmill.kernels.cross_entropy import operators as linear_cross_entropy
from chatmill.trainer.checkpoint.random_state import random_state, restore_random_state
from chatmill.trainer.config import ModelConfig, Recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.torch_engine import TorchEngine
from chatmill.trainer.generation.generation import Generation
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.model.tile_maps import TileMaps

SHAPE = {
    "vocab_size": 60_032,
    "hidden_size": 64,
    "intermediate_size": 128,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "context": 512,
}
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal")


class Waits(TorchDispatchMode):
    """Notes operations for whose result the host must wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in WAITS:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """On a GPU any wait is an error, wherever it is; on a CPU those that are operations of their own."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Waits() as waits:
        yield
    assert waits.found == []


def engine_on(device: torch.device, precision: str, **model: Any) -> TorchEngine:
    recipe = Recipe.model_validate(
        {"model": SHAPE | model, "data": {"sequence_length": 256}, "train": {"precision": precision}}
    )
    config = ModelConfig.model_validate(SHAPE | model)
    decoder = Decoder(config, recipe.kernels)
    decoder.init_weights(0)
    return TorchEngine(recipe, decoder, World(0, 1, 0, 1, device, "none"))


def batches(device: torch.device, count: int) -> list[PackedBatch]:
    def tile_maps(cu_seqlens: Any, T: int) -> TileMaps:
        return TileMaps({None: make_tile_map(cu_seqlens, T, head_dim=16, device=device)})

    on_gpu = device.type == "cuda"
    source = MemoryDataset.random(300, mean=60, longest=256)
    stream = PackedStream(source, sequence_length=256, micro_batch=4, pin=on_gpu, annotate=tile_maps if on_gpu else None)
    return list(islice(stream, count))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_waits_for_nothing_but_the_gradients_norm(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":  # there it reads the factor, which is free
        monkeypatch.setattr(linear_cross_entropy, "_scaled", lambda gradient, factor: gradient * factor)
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    engine, data = engine_on(where, "bf16"), batches(where, 4)
    engine.forward_backward(data[:2])  # kernels are compiled
    engine.step(1e-3)
    with no_wait(where):
        engine.forward_backward(data[2:])
        engine.clip()
    with Waits() as waits:
        engine.step(1e-3)
    assert [name for name in waits.found if name != "aten::equal"] == ["aten::_local_scalar_dense"]


@pytest.mark.gpu
def test_greedy_replies_equal_those_of_the_cpu() -> None:
    """fp32 on both; a tie in the logits would be the only way apart."""
    replies = {}
    for where in (torch.device("cpu"), torch.device("cuda", 0)):
        torch.backends.cuda.matmul.allow_tf32 = False
        engine = engine_on(where, "fp32")
        replies[where.type] = [step.id for step in Generation(engine.decoder, list(range(2, 40)), max_new_tokens=24)]
    assert len(replies["cpu"]) == 24
    assert replies["cuda"] == replies["cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_fall_and_follow_the_cpus(precision: str) -> None:
    losses: dict[str, list[float]] = {}
    for where in (torch.device("cpu"), torch.device("cuda", 0)):
        engine, data = engine_on(where, precision), batches(where, 2)
        losses[where.type] = []
        for _ in range(8):
            losses[where.type].append(float(engine.forward_backward(data).loss_sum) / data[0].step_loss_tokens)
            engine.step(3e-3)
    assert losses["cuda"][-1] < losses["cuda"][0] - 1
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3 if precision == "fp32" else 2e-2)


@pytest.mark.gpu
def test_the_generators_state_comes_back() -> None:
    device = torch.device("cuda", 0)
    draw: Callable[[], torch.Tensor] = lambda: torch.rand(4, device=device)  # noqa: E731
    draw()
    kept = random_state(device)
    first = draw()
    restore_random_state(kept, device)
    assert torch.equal(first, draw())
