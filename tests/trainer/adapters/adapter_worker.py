"""One of several processes that train an adapter with every engine and compare it with the single process.

All checks share one process group; see tests/trainer/engine/engine_worker.py.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from chatmill.trainer.adapters.sources import AdaptedSource
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, open_checkpoint
from chatmill.trainer.config import Recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.engine import Engine

from ..engine.engine_worker import Held, close, recipe_for, same, state, train
from .conftest import engine_on

ADAPTER = {"rank": 4, "alpha": 8, "train": ["norm.weight"]}
CHECKS: list[Callable[[World, str, Checkpoint], None]] = []


def check(function: Callable[[World, str, Checkpoint], None]) -> Callable[[World, str, Checkpoint], None]:
    CHECKS.append(function)
    return function


def recipe(data: str, base: Checkpoint, strategy: str, **sections: Any) -> Recipe:
    model = base.config.model_dump(mode="json") | {"checkpoint": str(base.path)} | sections.pop("model", {})
    sections = {"adapter": ADAPTER} | sections
    return recipe_for(data, strategy, model=model, **{name: value for name, value in sections.items() if value is not None})


def restored(world: World, base: Checkpoint, recipe: Recipe, saved: dict[str, torch.Tensor]) -> Engine:
    """A new engine with what another one saved."""
    held = Held(saved)
    assert recipe.adapter is not None
    engine = engine_on(base, recipe, world, AdaptedSource(base, held, recipe.adapter.scale))
    engine.load_optimizer(held)
    if engine.average is not None:
        engine.load_average(held)
    return engine


def follows(
    world: World, data: str, base: Checkpoint, strategies: tuple[str, ...], tolerance: float = 2e-5, **sections: Any
) -> None:
    """Every engine trains as one process does; what it saves is the adapter, and the next engine goes on from it."""
    parallel = sections.pop("parallel", {})
    single = engine_on(base, recipe(data, base, "single", **sections))
    wanted, weights = train(single), state(single)
    further = train(single, 2, skip=3)
    saved = weights
    for strategy in strategies:
        engine = engine_on(base, recipe(data, base, strategy, **sections, parallel={"strategy": strategy, **parallel}), world)
        close(train(engine), wanted, tolerance)
        found = state(engine)
        assert set(found) == set(weights), set(found) ^ set(weights)
        for name, tensor in weights.items():
            if name.startswith(("model:", "ema:")):
                torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=10 * tolerance, msg=f"{strategy} {name}")
        again = restored(world, base, engine.recipe, saved)  # of the engine before
        same(state(again), saved)
        close(train(again, 2, skip=3), further, tolerance)
        saved = found


@check
def every_engine_follows_one_process(world: World, data: str, base: Checkpoint) -> None:
    zero = ("zero1", "zero2", "zero3") if importlib.util.find_spec("deepspeed") else ()
    follows(world, data, base, ("ddp", "fsdp2", *zero), train={"ema": 0.5})


@check
def dora_and_muon_follow_one_process(world: World, data: str, base: Checkpoint) -> None:
    adapter = ADAPTER | {"method": "dora", "targets": ["q", "o", "mlp.*"]}
    zero = ("zero3",) if importlib.util.find_spec("deepspeed") else ()
    options = {"optimizer": {"name": "muon"}, "train": {"activation_checkpointing": True}}
    follows(world, data, base, ("ddp", "fsdp2", *zero), adapter=adapter, **options)


@check
def a_quantised_base_is_sharded_and_follows_one_process(world: World, data: str, base: Checkpoint) -> None:
    for precision in ("nf4", "int8", "bf16"):
        model = {"base_precision": precision}
        follows(world, data, base, ("fsdp2", "ddp") if precision == "nf4" else ("fsdp2",), model=model)
    pissa = {"rank": 4, "alpha": 8, "init": "pissa"}
    follows(world, data, base, ("fsdp2",), model={"base_precision": "nf4"}, adapter=pissa, parallel={"offload": "cpu"})


@check
def compiled_layers_follow_one_process_that_compiles_nothing(world: World, data: str, base: Checkpoint) -> None:
    zero = [("zero2", "fp32"), ("zero3", "fp32")] if importlib.util.find_spec("deepspeed") else []
    for strategy, precision in [("ddp", "fp32"), ("fsdp2", "nf4"), *zero]:
        sections: dict[str, Any] = {"model": {"base_precision": precision}}
        wanted = train(engine_on(base, recipe(data, base, "single", **sections)), 2)
        sections |= {"train": {"compile": True, "compile_backend": "aot_eager", "activation_checkpointing": True}}
        close(train(engine_on(base, recipe(data, base, strategy, **sections), world), 2), wanted)


@check
def compute_in_bf16_goes_through_every_engine(world: World, data: str, base: Checkpoint) -> None:
    zero = ("zero2", "zero3") if importlib.util.find_spec("deepspeed") else ()
    wanted = train(engine_on(base, recipe(data, base, "single", train={"precision": "bf16"})))
    for strategy in ("ddp", "fsdp2", *zero):
        for precision in ("bf16", "nf4")[: 1 if strategy in zero else 2]:
            made = recipe(data, base, strategy, train={"precision": "bf16"}, model={"base_precision": precision})
            engine = engine_on(base, made, world)
            close(train(engine), wanted, 5e-3 if precision == "bf16" else 1e-1)
            same(state(restored(world, base, made, state(engine))), state(engine))


@check
def frozen_weights_follow_one_process(world: World, data: str, base: Checkpoint) -> None:
    """train.freeze without an adapter: the checkpoint is a whole model."""
    sections: dict[str, Any] = {"adapter": None, "train": {"freeze": ["embed.weight", "layers.0.*"]}}
    single = engine_on(base, recipe(data, base, "single", **sections))
    wanted, weights = train(single), state(single)
    for strategy in ("ddp", "fsdp2", *(("zero2", "zero3") if importlib.util.find_spec("deepspeed") else ())):
        engine = engine_on(base, recipe(data, base, strategy, **sections), world)
        close(train(engine), wanted)
        found = state(engine)
        assert set(found) == set(weights)
        assert torch.equal(found["model:layers.0.mlp.up.weight"], base.tensor("layers.0.mlp.up.weight"))
        assert set(base.names()) == {name.removeprefix("model:") for name in found if name.startswith("model:")}


def run(data: str, base: str, names: tuple[str, ...] = ()) -> None:
    """Join the group that RANK and WORLD_SIZE tell of and run the checks."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), "gloo")
    for function in CHECKS:
        if names and function.__name__ not in names:
            continue
        function(world, data, open_checkpoint(base))
        if rank == 0:
            print(f"passed {function.__name__}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
