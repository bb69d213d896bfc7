"""`chatmill doctor --dry-world N RECIPE`: one training step of N processes, rank by rank on this machine, without computing.

    chatmill doctor --dry-world 4096 8b parallel.strategy=fsdp2 [--ranks 0,1,4095] [--json]

The real model, engine and optimizer run on fake tensors, in a process group whose collectives do nothing (torch's "fake"
backend). Every collective is recorded with its group. Ranks are simulated one after another: those at the corners of the
grid, all members of rank 0's small groups, and two drawn by chance, unless --ranks says otherwise. Members of a group must
call the same operations with the same shapes and types, in the same order; the first that differs is named. The order of
calls between different groups is not compared. Bytes of memory are those that a rank keeps between steps; the peak within a
step is what `chatmill plan` says. DDP checks its weights in C++, where fake tensors have no data, and DeepSpeed allocates its
buckets there: both are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from chatmill.config import ConfigError
from chatmill.formatting import duration

from ...data.stream import PackedBatch, divided, padded_rows
from ...kernels.dispatch import planning_for_gpu
from ...trainer.adapters.prepare import prepare
from ...trainer.adapters.quantised import only_shapes
from ...trainer.backends.choose import build_model
from ...trainer.checkpoint.sharding import local_of
from ...trainer.config import ModelConfig, Recipe
from ...trainer.distributed.world import World
from ...trainer.engine.torch_engine import TorchEngine
from ...trainer.parallel_config import Grid, grid_of
from ...trainer.plan.hardware import GIB
from ...trainer.plan.memory_trace import ON_GPU
from ..jobs.resolve import model_shape, resolve

MOST = 4096
SMALL = 8  # members of a group that are all simulated
SPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
NAMES = {
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
}


@dataclass(frozen=True)
class Collective:
    """One call: what every member of the group must do alike. shapes: of all its tensors. ranks: the group's members."""

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    bytes: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        return f"{self.operation} {shapes} {self.dtype}"


@dataclass(frozen=True)
class RankStep:
    """What one rank keeps, in bytes, and all that it says to others in one step."""

    rank: int
    weights: int
    gradients: int
    optimizer: int
    calls: tuple[Collective, ...]


class Recorder(TorchDispatchMode):
    """Notes every collective that passes, below DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it take itself apart first
        name = func._schema.name.partition("::")
        if name[0] in SPACES and name[2] not in ("wait_tensor", "_wrap_tensor_autograd"):
            flat = [*tree_flatten(args)[0], *tree_flatten(kwargs or {})[0]]
            tensors = [value for value in flat if isinstance(value, Tensor)]
            shapes = tuple(tuple(tensor.shape) for tensor in tensors)
            size = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            ranks = _group(flat)
            if NAMES.get(name[2]) == "all_gather" and name[0] != "c10d":  # the functional form has no tensor for its result yet
                size *= len(ranks)
            dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
            self.calls.append(Collective(NAMES.get(name[2], name[2]), shapes, dtype, size, ranks))
        return func(*args, **(kwargs or {}))


def _group(values: Sequence[Any]) -> tuple[int, ...]:
    """Members of the process group among the arguments of a collective."""
    for value in values:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min", "product"):
            group = dist.distributed_c10d._resolve_process_group(cast(Any, value))
            return tuple(dist.get_process_group_ranks(group))
    return ()


def dry_world(
    recipe: Recipe, shape: ModelConfig, world_size: int, ranks: Sequence[int] | None = None, seed: int = 0
) -> Iterator[RankStep]:
    """The step of each simulated rank. ranks: default as above. Raises ConfigError for engines that cannot be simulated."""
    check(recipe, world_size, ranks)
    grid = grid_of(recipe.parallel, world_size)
    # a process each: torch keeps meshes of one rank in caches that the next rank would find
    method = "fork" if sys.platform == "linux" else "spawn"
    with get_context(method).Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        work = partial(simulate, recipe, shape, world_size)
        (first,) = pool.map(work, (ranks or [0])[:1])
        yield first
        others = list(ranks[1:]) if ranks else chosen_ranks(grid, world_size, first.calls, seed)
        yield from pool.imap(work, others, chunksize=1)


def check(recipe: Recipe, world_size: int, ranks: Sequence[int] | None) -> None:
    """Raises ConfigError for what cannot be simulated."""
    if not 2 <= world_size <= MOST:
        raise ConfigError(f"--dry-world {world_size}: expected 2 to {MOST} processes")
    if recipe.parallel.strategy != "fsdp2":
        raise ConfigError(
            f"--dry-world simulates parallel.strategy=fsdp2, not {recipe.parallel.strategy}: ddp and DeepSpeed do part of\n"
            "their work in C++, which needs tensors with data. Add parallel.strategy=fsdp2 to see its layouts."
        )
    if outside := [rank for rank in ranks or () if not 0 <= rank < world_size]:
        raise ConfigError(f"--ranks {outside[0]}: expected 0 to {world_size - 1}")


def chosen_ranks(grid: Grid, world_size: int, calls: Sequence[Collective], seed: int) -> list[int]:
    """Corners of the grid, members of rank 0's small groups, two drawn by chance; without rank 0."""
    copy = grid.shards * grid.context
    corners = {0, grid.context - 1, copy - grid.context, copy - 1, world_size - copy, world_size - 1}
    members = {rank for call in calls if len(call.ranks) <= SMALL for rank in call.ranks}
    drawn = random.Random(seed).sample(range(world_size), min(2, world_size))
    return sorted({*corners, *members, *drawn} - {0})


@contextmanager
def process_group(rank: int, world_size: int) -> Iterator[None]:
    """A group whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulate(recipe: Recipe, shape: ModelConfig, world_size: int, rank: int) -> RankStep:
    """One optimizer step of one rank."""
    train = recipe.train
    world = World(rank, world_size, 0, 1, torch.device("cpu"), "fake", recipe.parallel.context)
    batch = whole_batch(train.micro_batch * recipe.data.sequence_length)
    if world.context > 1:
        batch = divided(batch, world.context_rank, world.context)
    recorder = Recorder()
    with process_group(rank, world_size), FakeTensorMode(allow_non_fake_inputs=True) as fake, planning_for_gpu(), only_shapes():
        model = build_model(shape, ON_GPU)
        prepare(model, recipe)
        model.set_recompute(train.activation_checkpointing, train.activation_checkpointing_layers)
        engine = TorchEngine(recipe, model, world)
        batch = replace(batch, rows=fake.from_tensor(batch.rows))  # on a CPU their values would be looked at
        with recorder:
            engine.forward_backward([batch] * train.accumulation)
            gradients = sum(local_of(p.grad).nbytes for p in model.parameters() if p.grad is not None)
            engine.clip()
            engine.update(recipe.optimizer.lr)
        weights = sum(local_of(p).nbytes for p in model.parameters())
        state = sum(local_of(t).nbytes for s in engine.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    return RankStep(rank, weights, gradients, state, tuple(recorder.calls))


def whole_batch(tokens: int) -> PackedBatch:
    """One pack of one document, every token with a loss."""
    with unset_fake_temporarily():
        ramp, zeros = torch.arange(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        batch: dict[str, Any] = {"tokens": zeros, "targets": zeros.long(), "positions": ramp, "cu_seqlens": ends}
        batch |= dict.fromkeys(("max_seqlen", "loss_tokens", "n_tokens", "step_loss_tokens", "step_tokens"), tokens)
        return PackedBatch(**batch, rows=padded_rows(ramp.numpy()), uids=("one",))


def first_difference(steps: Sequence[RankStep]) -> str | None:
    """Names the first collective that two members of a group do not do alike; None if there is none."""
    seen: dict[tuple[int, ...], tuple[int, list[Collective]]] = {}
    for step in steps:
        for ranks in dict.fromkeys(call.ranks for call in step.calls):
            mine = [call for call in step.calls if call.ranks == ranks]
            other, theirs = seen.setdefault(ranks, (step.rank, mine))
            for k in range(max(len(mine), len(theirs))):
                a, b = (str(calls[k]) if k < len(calls) else "nothing" for calls in (theirs, mine))
                if a != b:
                    return f"{_place(ranks, k)}: rank {other} does {a}, rank {step.rank} {b}"
    for step in steps:  # a rank that never calls a group of which it is a member
        for ranks, (other, calls) in seen.items():
            if step.rank in ranks and not any(call.ranks == ranks for call in step.calls):
                return f"{_place(ranks, 0)}: rank {other} does {calls[0]}, rank {step.rank} nothing"
    return None


def _place(ranks: tuple[int, ...], index: int) -> str:
    return f"collective {index + 1} of the {len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"


def totals(step: RankStep) -> list[tuple[str, int, int, int]]:
    """(operation, members of the group, calls, bytes), the most bytes first."""
    count: Counter[tuple[str, int]] = Counter((call.operation, len(call.ranks)) for call in step.calls)
    size: Counter[tuple[str, int]] = Counter()
    for call in step.calls:
        size[call.operation, len(call.ranks)] += call.bytes
    return [(*key, count[key], size[key]) for key, _ in size.most_common()]


def main(options: argparse.Namespace) -> int:
    """The command; torch must be there."""
    if not options.words:
        raise ConfigError("doctor --dry-world: expected a recipe, for example chatmill doctor --dry-world 64 8b")
    name, *overrides = options.words
    recipe = resolve(name, overrides, options.dry_world).recipe
    shape = model_shape(recipe) or recipe.model.shape()
    try:
        ranks = [int(word) for word in options.ranks.split(",")] if options.ranks else None
    except ValueError:
        raise ConfigError(f"--ranks {options.ranks}: expected numbers, for example 0,1,4095") from None
    return command(recipe, shape, options.dry_world, ranks, options.json)


def command(recipe: Recipe, shape: ModelConfig, world_size: int, ranks: Sequence[int] | None, as_json: bool) -> int:
    """The command: 1 if members of a group disagree."""
    began, steps = time.monotonic(), []
    for step in dry_world(recipe, shape, world_size, ranks):
        steps.append(step)
        if not as_json:
            kept = "  ".join(f"{name} {getattr(step, name) / GIB:.3f}" for name in ("weights", "gradients", "optimizer"))
            print(f"rank {step.rank:<5} GiB kept: {kept}   {len(step.calls)} collectives", flush=True)
    wrong = first_difference(steps)
    if as_json:
        found = [{"operation": o, "group": g, "calls": n, "bytes": b} for o, g, n, b in totals(steps[0])]
        kept_by = [{**asdict(step), "calls": len(step.calls)} for step in steps]
        print(json.dumps({"world_size": world_size, "ranks": kept_by, "collectives": found, "difference": wrong}, indent=1))
        return int(wrong is not None)
    print(f"\nrank {steps[0].rank}, one step:")
    for operation, members, calls, size in totals(steps[0]):
        print(f"  {operation:<16}{calls:>6} calls  {size / GIB:>10.3f} GiB   among {members} ranks")
    grid = grid_of(recipe.parallel, world_size)
    print(f"\nworld of {world_size}: replicas {grid.replicas} x shards {grid.shards} x context {grid.context}")
    print(f"{len(steps)} ranks simulated in {duration(time.monotonic() - began)}: {wrong or 'they agree'}")
    return int(wrong is not None)
