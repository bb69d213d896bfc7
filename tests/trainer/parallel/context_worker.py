"""What four forked ranks compute together, in one process group: attention over divided packs, and whole steps of an engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.stream import Division, PackedBatch, PackedStream, divided
from chatmill.kernels.attention import attention_reference
from chatmill.launcher.doctor.parity_rank import full_gradients
from chatmill.trainer.config import Recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.choose import build_engine
from chatmill.trainer.engine.engine import Engine
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.parallel.context import ContextGroup, SharedBatch
from chatmill.trainer.parallel.grid import context_group, device_mesh
from chatmill.trainer.parallel_config import Grid

LENGTH = 96
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "context": LENGTH,
    "initializer_range": 0.15,
}
# four packs: documents of one token up to a whole pack, some shorter than the ranks are many
LENGTHS = [1, 1, 1, 2, 3, 1, 5, 7, 4, 1, 11, 2, 13, 6, 1, 9, 17, 11, 61, 1, 34, 96, *[1] * 30, 4, 62]
RULES: list[dict[str, Any]] = [{}, {"window": 3}, {"window": 17}, {"softcap": 2.0}, {"window": 40, "softcap": 2.0}]


def world_of(size: int, context: int = 1) -> World:
    rank = dist.get_rank()
    return World(rank, size, rank, size, torch.device("cpu"), "gloo", context)


def batch_of(lengths: Sequence[int]) -> PackedBatch:
    """A whole batch of such documents."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    T = int(bounds[-1])
    positions = np.arange(T, dtype=np.int32) - np.repeat(bounds[:-1], lengths)
    tensors = [torch.zeros(T, dtype=torch.int32), torch.zeros(T, dtype=torch.int64)]
    return PackedBatch(
        *tensors, torch.from_numpy(positions), torch.from_numpy(bounds), tensors[0], max(lengths), 0, 0, 0, 0, ()
    )


def attention_parity(folder: str) -> None:
    """Both ways to attend against the reference, in fp64: outputs and all gradients, for context 2 and 4."""
    dist.init_process_group("gloo")
    worst = 0.0
    for size in (2, 4):
        grid = Grid(1, 4 // size, size)
        group = context_group(device_mesh(grid, "cpu"), grid)
        rank = dist.get_rank(group)
        batch, T = batch_of(LENGTHS), sum(LENGTHS)
        for rules, (method, heads, kv_heads) in itertools.product(
            RULES, [("ulysses", 4, 2), ("ulysses", 12, 6), ("ring", 3, 1)]
        ):
            torch.manual_seed(5)  # every rank draws the same
            *whole, weight = (torch.randn(T, n, 8, dtype=torch.float64) for n in (heads, kv_heads, kv_heads, heads))
            whole = [x.requires_grad_() for x in whole]
            out, _ = attention_reference(*whole, cu_seqlens=batch.cu_seqlens, **rules)
            expected = [out, *torch.autograd.grad((out * weight).sum(), whole)]
            part = divided(batch, rank, size)
            assert isinstance(part.division, Division)
            own = [x.detach()[rank::size].clone().requires_grad_() for x in whole]
            shared = SharedBatch(ContextGroup(group, rank, size, method), part.division, part.positions)
            options = {"window": None, "softcap": None} | rules
            found = shared.attend(
                *own, impl="torch", cu_seqlens=part.division.cu_seqlens, max_seqlen=part.max_seqlen, **options
            )
            assert type(found) is Tensor
            gradients = torch.autograd.grad((found * weight[rank::size]).sum(), own)
            for got, want in zip([found, *gradients], expected, strict=True):
                off = float((got.detach() - want.detach()[rank::size]).abs().max())
                assert off < 1e-10, (rules, method, heads, kv_heads, size, off)
                worst = max(worst, off)
    print(f"largest difference {worst:.1e}")
    dist.barrier()


def dialogues(count: int = 120) -> MemoryDataset:
    """Dialogues of one token up to a whole pack, about half of their tokens supervised."""
    rng = np.random.default_rng(3)
    made: list[tuple[str, Any, Any]] = []
    for i in range(count):
        length = int(min(LENGTH, rng.choice([1, 2, 3, 7, 20, 50, LENGTH]) + rng.integers(0, 3)))
        mask = rng.random(length) < 0.5
        mask[0] = False
        made.append((f"d{i}", rng.integers(1, 97, length), mask))
    return MemoryDataset(made, vocab_size=97)


def recipe_for(strategy: str, micro_batch: int, **sections: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "data": {"sequence_length": LENGTH},
        "model": SHAPE,
        "optimizer": {"lr": 1e-2},
        "train": {"precision": "fp32", "micro_batch": micro_batch},
        "parallel": {"strategy": strategy},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return Recipe.model_validate(base)


def engine_for(recipe: Recipe, world: World) -> Engine:
    model = Decoder(recipe.model.shape(), recipe.kernels)
    model.set_recompute(recipe.train.activation_checkpointing)
    model.init_weights(0)
    engine = build_engine(recipe, model, world)
    engine.describe()
    return engine


def steps(engine: Engine, recipe: Recipe, world: World, count: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of so many steps (the last one without a backward pass) and the first step's whole gradients."""
    options = {"sequence_length": LENGTH, "micro_batch": recipe.train.micro_batch, "seed": 1, "prefetch": 0}
    batches = iter(PackedStream(dialogues(), **options, **world.place()))
    losses, gradients = [], {}
    for step in range(count):
        micro = [next(batches)]
        if step + 1 < count:
            loss = engine.forward_backward(micro).loss_sum
            gradients = gradients or full_gradients(engine)
            engine.step(1e-2)
        else:
            with torch.no_grad():
                loss = engine.forward(micro[0]).loss_sum
        losses.append(world.sum([float(loss)])[0] / micro[0].step_loss_tokens)
    return losses, gradients


def alone() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"), "none")


CASES: dict[str, dict[str, Any]] = {
    "ddp, context 4, exchanged heads, 2 key heads": {"parallel": {"strategy": "ddp", "context": 4}},
    "ddp, context 4, ring, window and soft-cap": {
        "parallel": {"strategy": "ddp", "context": 4, "context_method": "ring"},
        "model": {"sliding_window": 9, "sliding_layers": [1], "attention_softcap": 3.0, "qk_norm": True},
    },
    "fsdp2, context 2 x shards 2, recomputation": {
        "parallel": {"strategy": "fsdp2", "context": 2, "shards": 2},
        "train": {"activation_checkpointing": "selective"},
    },
    "fsdp2, replicas 2 x context 2, 3 heads go around a ring": {
        "parallel": {"strategy": "fsdp2", "context": 2, "replicas": 2},
        "model": {"heads": 3, "kv_heads": 1},
        "train": {"activation_checkpointing": True},
    },
    "fsdp2, context 4, ring, recomputation": {
        "parallel": {"strategy": "fsdp2", "context": 4, "context_method": "ring"},
        "train": {"activation_checkpointing": "selective"},
    },
}


def engine_parity(folder: str) -> None:
    """Losses within 2e-5 and gradients within 1e-4 of one process, for every case."""
    dist.init_process_group("gloo")
    for name, sections in CASES.items():
        parallel = sections["parallel"]
        world = world_of(4, parallel["context"])
        recipe = recipe_for(parallel["strategy"], 4 // world.batches, **sections)
        engine = engine_for(recipe, world)
        losses, gradients = steps(engine, recipe, world)
        if world.is_main:
            rest = {key: value for key, value in sections.items() if key != "parallel"}
            single = recipe_for("single", 4, **rest)
            expected_losses, expected = steps(engine_for(single, alone()), single, alone())
            off = max(abs(a - b) / b for a, b in zip(losses, expected_losses, strict=True))
            gap = max(float((gradients[key] - g).norm() / g.norm()) for key, g in expected.items())
            print(f"{name}: loss {off:.1e}, gradient {gap:.1e}")
            assert off < 2e-5, (name, off)
            assert gap < 1e-4, (name, gap)
        dist.barrier()
