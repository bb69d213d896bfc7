"""One of several processes that build engines side by side and compare them with the single process.

    RANK=0 WORLD_SIZE=2 python -m tests.trainer.engine.engine_worker STORE DATA CHECK ...        (or `run`, in a forked rank)

All checks of a test share one process group (found through the file STORE, so that no port has to be free), because starting it
costs more than the checks. Each rank also runs the single engine on the whole batch: the truth to compare with.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.trainer.checkpoint.vocabulary import WiderTables
from chatmill.trainer.config import Recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.choose import build_engine
from chatmill.trainer.engine.engine import Engine
from chatmill.trainer.engine.torch_engine import TorchEngine
from chatmill.trainer.model.decoder import Decoder, LossOutput

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 129,  # rows that no world size divides
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "context": 256,
    "qk_norm": True,
}
CHECKS: dict[str, Callable[[World, str], None]] = {}


def check(function: Callable[[World, str], None]) -> Callable[[World, str], None]:
    """Register a check by its name."""
    CHECKS[function.__name__] = function
    return function


def recipe_for(data: str, strategy: str, **sections: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "data": {"path": data, "sequence_length": 128},
        "model": SHAPE,
        "optimizer": {"lr": 1e-2},
        "train": {"precision": "fp32", "accumulation": 4 if strategy == "single" else 2},
        "parallel": {"strategy": strategy},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return Recipe.model_validate(base)


def make_engine(world: World, recipe: Recipe) -> Engine:
    model = Decoder(recipe.model.shape(), recipe.kernels)
    model.set_recompute(recipe.train.activation_checkpointing)
    model.init_weights(0)
    engine = build_engine(recipe, model, world)
    engine.describe()
    return engine


def alone() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"), "none")


def steps_of(recipe: Recipe, world: World, count: int, skip: int = 0) -> Iterator[list[PackedBatch]]:
    """The micro-batches of so many optimizer steps; global batch 4 packs, whatever the world size."""
    accumulation = 4 // world.world_size
    stream = PackedStream(
        TokenDataset.open(recipe.data.path, "train"),
        sequence_length=128,
        accumulation=accumulation,
        rank=world.rank,
        world_size=world.world_size,
        prefetch=0,
    )
    batches = iter(stream)
    for i in range(count + skip):
        micro = [next(batches) for _ in range(accumulation)]
        if i >= skip:
            yield micro


def train(engine: Engine, count: int = 3, skip: int = 0) -> list[float]:
    """Global losses of some steps."""
    losses = []
    for micro in steps_of(engine.recipe, engine.world, count, skip):
        sums = engine.forward_backward(micro)
        engine.step(1e-2)
        losses.append(engine.world.sum([float(sums.loss_sum)])[0] / micro[0].step_loss_tokens)
    return losses


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """Full tensors, put together from the ranks' shares as a checkpoint does it."""
    mine = [(s.group, s.name, s.shape, s.start, s.tensor.detach().clone()) for s in engine.shares()]
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for group, name, shape, start, tensor in itertools.chain.from_iterable(engine.world.gather(mine)):
        pieces.setdefault(f"{group}:{name}", []).append((start, tensor.flatten()))
        shapes[f"{group}:{name}"] = shape
    return {
        name: torch.cat([tensor for _, tensor in sorted(found, key=lambda piece: piece[0])]).reshape(shapes[name])
        for name, found in pieces.items()
    }


class Held:
    """What `state` gave, as the source that engines load from."""

    def __init__(self, saved: dict[str, torch.Tensor]) -> None:
        self.groups = {name.split(":", 1)[1]: name.split(":", 1)[0] for name in saved}
        self.tensors = {name.split(":", 1)[1]: tensor for name, tensor in saved.items()}

    def names(self, group: str = "model") -> list[str]:
        return [name for name, held in self.groups.items() if held == group]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name].flatten()[start:stop]


def restore(engine: Engine, saved: dict[str, torch.Tensor]) -> None:
    source = Held(saved)
    engine.load_model(source)
    engine.load_optimizer(source)
    if engine.average is not None:
        engine.load_average(source)


def close(found: list[float], wanted: list[float], tolerance: float = 2e-5) -> None:
    assert len(found) == len(wanted)
    assert all(abs(a - b) <= tolerance * abs(b) for a, b in zip(found, wanted, strict=True)), (found, wanted)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    differing = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not differing, differing


def agree_with_single(world: World, data: str, strategy: str, tolerance: float = 2e-5, **sections: dict[str, Any]) -> Engine:
    """Train alone and shared, compare losses and weights; returns the shared engine."""
    parallel = sections.pop("parallel", {})
    single = make_engine(alone(), recipe_for(data, "single", **sections))
    wanted, weights = train(single), state(single)
    engine = make_engine(world, recipe_for(data, strategy, **sections, parallel={"strategy": strategy, **parallel}))
    close(train(engine), wanted, tolerance)
    found = state(engine)
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        if name.startswith(("model:", "ema:")):
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=10 * tolerance, msg=name)
    return engine


# what Gemma, OLMo, GLM and Granite have beyond Llama, in one model
OPTIONS = {
    "norms": "around",
    "norm_offset": 1,
    "qk_norm_over": "projection",
    "activation": "gelu_tanh",
    "attention_softcap": 20.0,
    "logit_softcap": 10.0,
    "rotary_dim": 8,
    "rope_interleaved": True,
    "nope_layers": [1],
    "embedding_scale": 8.0,
    "attention_scale": 0.2,
    "residual_scale": 0.7,
    "logit_divisor": 3.0,
}


@check
def options_of_families_equal_one_process(world: World, data: str) -> None:
    for strategy in ("ddp", "fsdp2", *(["zero3"] if importlib.util.find_spec("deepspeed") else [])):
        agree_with_single(world, data, strategy, model=OPTIONS)


@check
def muon_equals_one_process(world: World, data: str) -> None:
    for strategy in ("ddp", "fsdp2"):
        engine = agree_with_single(world, data, strategy, optimizer={"name": "muon"})
        keys = {name.rpartition(".")[2] for name in state(engine) if "layers.0.mlp.up.weight" in name and "optimizer" in name}
        assert keys == {"momentum_buffer"}, keys


@check
def muon_under_zero_equals_one_process(world: World, data: str) -> None:
    """Stages 1 to 3, and what one wrote is what another, FSDP2 and one process read and go on from, bit for bit."""
    muon: dict[str, Any] = {"optimizer": {"name": "muon", "groups": {"layers.0.*": {"lr": 0.5}}}}
    saved: dict[str, torch.Tensor] = {}
    for strategy in ("zero1", "zero2", "zero3"):
        engine = agree_with_single(world, data, strategy, **muon, train={"ema": 0.5})
        if saved:  # read from the stage before
            again = make_engine(world, engine.recipe)
            restore(again, saved)
            same(state(again), saved)
        saved = state(engine)
        keys = {name.rpartition(".")[2] for name in saved if "layers.0.mlp.up.weight" in name and "optimizer" in name}
        assert keys == {"momentum_buffer"}, keys
        again = make_engine(world, engine.recipe)
        restore(again, saved)
        same(state(again), saved)
        assert train(again, 2, skip=3) == train(engine, 2, skip=3)
        same(state(again), state(engine))
    single = make_engine(alone(), recipe_for(data, "single", **muon, train={"ema": 0.5}))
    restore(single, saved)
    same(state(single), saved)
    wanted = train(single, 2, skip=3)
    close(train(engine, 2, skip=5), train(single, 2, skip=5))
    sharded = make_engine(world, recipe_for(data, "fsdp2", **muon, train={"ema": 0.5}))
    restore(sharded, saved)
    same(state(sharded), saved)
    close(train(sharded, 2, skip=3), wanted)


@check
def muon_under_zero_offloads_and_computes_in_bf16(world: World, data: str) -> None:
    muon: dict[str, Any] = {"optimizer": {"name": "muon"}}
    for strategy in ("zero1", "zero3"):
        agree_with_single(world, data, strategy, **muon, parallel={"offload": "cpu"})
    bf16: dict[str, Any] = muon | {"train": {"precision": "bf16"}}
    wanted = train(make_engine(world, recipe_for(data, "ddp", **bf16)))
    for strategy in (
        "zero1",
        "zero2",
        "zero3",
    ):  # zero1 in bf16 is another class of DeepSpeed's, which steps all groups at once
        engine = make_engine(world, recipe_for(data, strategy, **bf16))
        close(train(engine), wanted, 5e-3)
        assert engine.optimizer.dtype == torch.bfloat16  # type: ignore[attr-defined]
        saved = state(engine)
        again = make_engine(world, engine.recipe)
        restore(again, saved)
        same(state(again), saved)


@check
def hsdp_equals_one_process(world: World, data: str) -> None:
    engine = agree_with_single(world, data, "fsdp2", parallel={"replicas": 2})
    assert "2 shard(s) x 2 copies" in engine.describe()["sharding"]
    agree_with_single(world, data, "fsdp2", parallel={"reshard_after_forward": 2})
    agree_with_single(world, data, "fsdp2", parallel={"replicas": 2}, optimizer={"name": "muon"}, train={"ema": 0.9})


@check
def reshard_and_offload_equal_one_process(world: World, data: str) -> None:
    agree_with_single(world, data, "fsdp2", parallel={"reshard_after_forward": False})
    engine = agree_with_single(world, data, "fsdp2", parallel={"offload": "cpu"}, train={"ema": 0.9})
    assert engine.describe()["offload"] == "cpu"


@check
def zero_offload_equals_one_process(world: World, data: str) -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        engine = agree_with_single(world, data, strategy, parallel={"offload": "cpu"})
        assert engine.model.zero_cpu_offload()


@check
def nvme_offload_equals_one_process(world: World, data: str) -> None:
    """Weights and moments on a disk; what was read from there continues on another disk and in one process."""
    disks = [Path(name).absolute() for name in ("first-disk", "second-disk")]
    for disk in disks:
        disk.mkdir(exist_ok=True)
    parallel = {"offload": "nvme", "nvme_path": str(disks[0])}
    shape = {"model": SHAPE | {"hidden_size": 256, "intermediate_size": 2050}}  # DeepSpeed swaps no piece below 1 MiB
    engine = agree_with_single(world, data, "zero3", parallel=parallel, **shape)
    swapped = {file.relative_to(disks[0]).parts[1] for file in disks[0].rglob("*.swp") if file.stat().st_size}
    assert swapped == {"float32params", "optimizer"}, swapped
    saved = state(engine)
    single = make_engine(alone(), recipe_for(data, "single", **shape))
    restore(single, saved)
    same(state(single), saved)
    moved = {"strategy": "zero3", "offload": "nvme", "nvme_path": str(disks[1])}
    again = make_engine(world, recipe_for(data, "zero3", parallel=moved, **shape))
    restore(again, saved)
    same(state(again), saved)
    wanted = train(single, 2, skip=3)
    for one in (engine, again):
        close(train(one, 2, skip=3), wanted)


@check
def eight_bit_moments_do_not_depend_on_the_world_size(world: World, data: str) -> None:
    sections: dict[str, Any] = {"optimizer": {"name": "adamw8bit"}}
    first = agree_with_single(world, data, "fsdp2", 1e-3, **sections)
    saved = state(first)
    scale = saved["optimizer:layers.0.mlp.up.weight.exp_avg_scale"]
    assert scale.shape == (129, 1)
    assert saved["optimizer:layers.0.mlp.up.weight.exp_avg_codes"].dtype == torch.uint8
    single = make_engine(alone(), recipe_for(data, "single", **sections))
    restore(single, saved)
    same(state(single), saved)
    again = make_engine(world, recipe_for(data, "fsdp2", **sections))
    restore(again, state(single))
    same(state(again), saved)
    assert train(again, 2, skip=3) == train(first, 2, skip=3)
    same(state(again), state(first))


@check
def the_average_equals_one_process_and_is_restored_exactly(world: World, data: str) -> None:
    for strategy in ("ddp", "fsdp2"):
        follow_the_average(world, data, strategy)


@check
def the_average_works_under_zero(world: World, data: str) -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        follow_the_average(world, data, strategy)
    bf16 = make_engine(world, recipe_for(data, "zero1", train={"ema": 0.5, "precision": "bf16"}))
    train(bf16)
    before, copy = state(bf16), bf16.decoder.norm.weight.detach().clone()
    with bf16.averaged_weights():
        average = before["ema:ema.norm.weight"]
        assert torch.equal(bf16.decoder.norm.weight, average.bfloat16())
    assert torch.equal(bf16.decoder.norm.weight, copy)
    same(state(bf16), before)


def follow_the_average(world: World, data: str, strategy: str) -> None:
    engine = agree_with_single(world, data, strategy, train={"ema": 0.5})
    saved = state(engine)
    weight, average = saved["model:embed.weight"], saved["ema:ema.embed.weight"]
    assert not torch.allclose(weight, average, atol=1e-3)
    micro = next(steps_of(engine.recipe, world, 1))
    with torch.no_grad():
        trained = float(engine.forward(micro[0]).loss_sum)
        with engine.averaged_weights():
            inside = {k: v for k, v in state(engine).items() if k.startswith("model:")}
            averaged = float(engine.forward(micro[0]).loss_sum)
        again = float(engine.forward(micro[0]).loss_sum)
    same(inside, {f"model:{k[8:]}": v for k, v in saved.items() if k.startswith("ema:")})
    assert trained == again
    assert abs(trained - averaged) > 1e-3
    same(state(engine), saved)
    other = make_engine(world, engine.recipe)
    restore(other, saved)
    same(state(other), saved)
    assert train(other, 1, skip=3) == train(engine, 1, skip=3)
    same(state(other), state(engine))


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Collectives that this rank starts, by name."""
    found: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield found
    found.update(e.name for e in profile.events() or [] if e.name.startswith("c10d::"))


# the collective that carries gradients, and how often a step of four micro-batches calls it, against a step of one
GRADIENTS = {"ddp": ("allreduce_", 1), "fsdp2": ("_reduce_scatter_base_", 1), "zero1": ("allreduce_", 1)}
ZERO_GRADIENTS = {"zero2": ("allreduce_", 4), "zero3": ("_reduce_scatter_base_", 4)}


@check
def accumulation_communicates_once(world: World, data: str) -> None:
    """The gradients of four micro-batches cost the collectives of one, except in ZeRO-2 and 3 (docs/engines.md)."""
    cases = GRADIENTS | ZERO_GRADIENTS
    for strategy, (collective, factor) in cases.items():
        if strategy.startswith("zero") and not importlib.util.find_spec("deepspeed"):
            continue
        found = []
        for accumulation in (1, 4):
            recipe = recipe_for(data, strategy, train={"accumulation": accumulation})
            engine = make_engine(world, recipe)
            micro = [next(steps_of(recipe, world, 1))[0]] * accumulation
            engine.forward_backward(micro)  # the first step is another one: DeepSpeed learns in it what ZeRO-3 gathers when
            engine.step(1e-3)
            with counting() as backward:
                engine.forward_backward(micro)
            with counting() as step:
                engine.step(1e-3)
            gathers = {name for name in backward if "allgather" in name or "broadcast" in name}  # of weights
            gradients = {name.removeprefix("c10d::"): n for name, n in backward.items() if name not in gathers}
            found.append((gradients, step))
        (once, step), (often, other) = found
        assert set(once) == {collective}, (strategy, once)
        assert often == {collective: factor * once[collective]}, (strategy, found)
        assert step == other, (strategy, found)


@check
def compiled_layers_and_recomputation_equal_one_process(world: World, data: str) -> None:
    wanted = train(make_engine(alone(), recipe_for(data, "single")), 2)
    cases = [("ddp", "full", True), ("fsdp2", "selective", True), ("fsdp2", "full", False)]
    if importlib.util.find_spec("deepspeed"):
        cases.append(("zero3", "selective", False))
    for strategy, recompute, compiled in cases:
        options = {"activation_checkpointing": recompute, "compile": compiled, "compile_backend": "aot_eager"}
        engine = make_engine(world, recipe_for(data, strategy, train=options))
        close(train(engine, 2), wanted)
        proof = engine.describe()
        assert (proof["activation_checkpointing"], proof["compile"]) == (recompute, "aot_eager" if compiled else "none")


@check
def new_rows_are_the_same_in_every_engine(world: World, data: str) -> None:
    for strategy in ("ddp", "fsdp2"):
        load_new_rows(world, data, strategy)


@check
def new_rows_are_the_same_under_zero(world: World, data: str) -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        load_new_rows(world, data, strategy)


def load_new_rows(world: World, data: str, strategy: str) -> None:
    """384 untied rows in a model of 389: weights and average are those of the source, and it trains as one process does."""
    sections: dict[str, Any] = {"model": {"tied_embeddings": False}}
    small = Held(state(make_engine(alone(), recipe_for(data, "single", **sections))))
    source = WiderTables(small, 389, range(370), {380, 381, 384})
    sections = {"model": {"tied_embeddings": False, "vocab_size": 389}, "train": {"ema": 0.9}}
    engine = make_engine(world, recipe_for(data, strategy, **sections))
    engine.load_model(source)
    found = state(engine)
    mean = small.tensor("embed.weight")[:370].double().mean(0).float()
    assert torch.equal(found["model:embed.weight"][[380, 381, *range(384, 389)]], mean.expand(7, -1))
    for name in source.names():
        assert torch.equal(found[f"model:{name}"], source.tensor(name)), name
        assert torch.equal(found[f"ema:ema.{name}"], source.tensor(name)), name
    single = make_engine(alone(), recipe_for(data, "single", **sections))
    single.load_model(source)
    close(train(engine, 2), train(single, 2))


@check
def a_step_left_out_leaves_no_trace(world: World, data: str) -> None:
    for strategy in ("ddp", "fsdp2"):
        leave_out(world, data, strategy)


@check
def a_step_left_out_leaves_no_trace_under_zero(world: World, data: str) -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        leave_out(world, data, strategy)


def leave_out(world: World, data: str, strategy: str) -> None:
    """`discard`, and `step` after a NaN on one rank: no weight, moment or average changes, and training goes on as if not."""
    engine = make_engine(world, recipe_for(data, strategy, train={"ema": 0.9}))
    train(engine, 2)
    saved = state(engine)
    (micro,) = steps_of(engine.recipe, world, 1, skip=2)
    engine.forward_backward(micro)
    engine.discard()
    same(state(engine), saved)
    real = engine.forward
    if world.rank == 1:

        def spoiled(batch: PackedBatch) -> LossOutput:
            output = real(batch)
            return output._replace(loss_sum=output.loss_sum * math.nan)

        engine.forward = spoiled  # type: ignore[method-assign]
    engine.forward_backward(micro)
    norm = engine.step(1e-2)
    engine.forward = real  # type: ignore[method-assign]
    assert not math.isfinite(norm), norm
    same(state(engine), saved)
    other = make_engine(world, engine.recipe)
    train(other, 2)
    assert train(engine, 1, skip=2) == train(other, 1, skip=2)
    same(state(engine), state(other))


@check
def a_missing_gradient_is_refused(world: World, data: str) -> None:
    from chatmill.config import ConfigError

    engine = make_engine(world, recipe_for(data, "ddp"))
    micro = next(steps_of(engine.recipe, world, 1))
    engine.forward_backward(micro)
    parameter = engine.decoder.norm.weight
    parameter.grad = None
    try:
        engine.step(1e-3)
    except ConfigError as error:
        assert "norm.weight is none" in str(error)
    else:
        raise AssertionError("a missing gradient went unnoticed")


@check
def triton_kernels_work_on_gathered_weights(world: World, data: str) -> None:
    """Interpreted (TRITON_INTERPRET=1 before triton is imported), so as small as it can be: one layer, one pack per rank."""
    small = {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    kernels = {"attention": "triton", "cross_entropy": "triton", "elementwise": "triton"}
    packs = [steps[0] for steps in steps_of(recipe_for(data, "single"), world, 1)]
    truth = Decoder(recipe_for(data, "single", model=small).model.shape())
    truth.init_weights(0)
    losses = TorchEngine(recipe_for(data, "single", model=small), truth, alone()).forward(packs[0]).loss_sum
    total = world.sum([float(losses)])[0]
    for strategy in ["fsdp2", *(["zero3"] if importlib.util.find_spec("deepspeed") else [])]:
        recipe = recipe_for(data, strategy, model=small, kernels=kernels, train={"accumulation": 1})
        engine = make_engine(world, recipe)
        sums = engine.forward_backward(packs)
        assert engine.step(1e-3) > 0
        close(world.sum([float(sums.loss_sum)]), [total])


def run(data: str, names: Sequence[str], meeting_place: str = "env://") -> None:
    """Join the group that RANK and WORLD_SIZE tell of and run the named checks."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_place, rank=rank, world_size=world_size)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"), "gloo")
    for name in names:
        CHECKS[name](world, data)
        if rank == 0:
            print(f"passed {name}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Run the named checks; exit 1 with the traceback of the first that fails."""
    store, data, *names = sys.argv[1:]
    try:
        run(data, names, f"file://{store}")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the other ranks wait in a collective: leave at once
    return 0


if __name__ == "__main__":
    sys.exit(main())
