"""What four forked ranks compute together, in one process group: attention over divided packs, and whole steps of an engine."""

from __future__ import annotations

import contextlib
import itertools
import math
import resource
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.stream import Division, PackedBatch, PackedStream, divided
from chatmill.kernels.attention import attention_reference
from chatmill.launcher.doctor.parity_rank import full_gradients
from chatmill.trainer.config import PreferenceSection, Recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.choose import build_engine
from chatmill.trainer.engine.engine import Engine
from chatmill.trainer.evaluation.loss import evaluate, validation_batches
from chatmill.trainer.loop.dpo import PairObjective, ScoreObjective, reference_pass, take_reference
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
RULES: list[dict[str, Any]] = [
    {},
    {"window": 3},
    {"window": 17},
    {"softcap": 2.0},
    {"window": 40, "softcap": 2.0, "scale": 0.2},
]  # the last one with sinks


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
            sinks = torch.randn(heads, dtype=torch.float64).requires_grad_()
            given = rules | ({"sinks": sinks} if "scale" in rules else {})
            out, _ = attention_reference(*whole, cu_seqlens=batch.cu_seqlens, **given)
            wanted = [out.detach(), *torch.autograd.grad((out * weight).sum(), whole, retain_graph=True)]
            part = divided(batch, rank, size)
            assert isinstance(part.division, Division)
            own = [x.detach()[rank::size].clone().requires_grad_() for x in whole]
            shared = SharedBatch(ContextGroup(group, rank, size, method), part.division, part.positions)
            found = shared.attend(*own, impl="torch", cu_seqlens=part.division.cu_seqlens, max_seqlen=part.max_seqlen, **given)
            assert type(found) is Tensor
            loss = (found * weight[rank::size]).sum()
            gradients = torch.autograd.grad(loss, own, retain_graph=True)
            pairs = [(got, want[rank::size]) for got, want in zip([found.detach(), *gradients], wanted, strict=True)]
            if "sinks" in given:  # a parameter: each rank has a part of its gradient
                part_of = torch.autograd.grad(loss, sinks)[0]
                dist.all_reduce(part_of, group=group)
                pairs.append((part_of, torch.autograd.grad((out * weight).sum(), sinks)[0]))
            for got, want in pairs:
                off = float((got - want).abs().max())
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


def steps(
    engine: Engine, recipe: Recipe, world: World, count: int = 2, data: MemoryDataset | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of so many steps (the last one without a backward pass) and the first step's whole gradients."""
    options = {"sequence_length": LENGTH, "micro_batch": recipe.train.micro_batch, "seed": 1, "prefetch": 0}
    batches = iter(PackedStream(data or dialogues(), overlong="drop", **options, **world.place()))
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
        losses.append(world.sum([float(loss)])[0] / micro[0].step_examples)
    return losses, gradients


def alone() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"), "none")


CASES: dict[str, dict[str, Any]] = {
    "ddp, context 4, exchanged heads, 2 key heads": {"parallel": {"strategy": "ddp", "context": 4}},
    "ddp, context 4, ring, window, soft-caps, a layer without positions": {
        "parallel": {"strategy": "ddp", "context": 4, "context_method": "ring"},
        "model": {
            "sliding_window": 9,
            "sliding_layers": [1],
            "window_rope_theta": 100.0,
            "attention_scale": 0.3,
            "attention_softcap": 3.0,
            "logit_softcap": 5.0,
            "qk_norm": True,
            "norms": "around",
            "nope_layers": [0],
        },
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
    "fsdp2, context 4, ring, recomputation, Muon, averaged weights": {
        "parallel": {"strategy": "fsdp2", "context": 4, "context_method": "ring"},
        "train": {"activation_checkpointing": "selective", "ema": 0.5},
        "optimizer": {"name": "muon"},
    },
}


def pairs(count: int = 24) -> MemoryDataset:
    """Preference pairs: twice the same context, each with a reply of one to twelve tokens."""
    rng = np.random.default_rng(4)
    made: list[tuple[str, Any, Any]] = []
    for i in range(count):
        context, chosen, rejected = rng.integers([1, 1, 1], [12, 12, 12]).tolist()
        mask = np.repeat([False, True, False, True], [context, chosen, context, rejected])
        ids = rng.integers(1, 97, len(mask))
        ids[context + chosen : 2 * context + chosen] = ids[:context]
        made.append((f"p{i}", ids, mask))
    dataset = MemoryDataset(made, vocab_size=97)
    dataset.preference = True  # type: ignore[attr-defined]
    return dataset


def measured(engine: Engine, world: World) -> dict[str, float]:
    """What a validation finds, with the trained and with the averaged weights."""
    found = {}
    for name in ("trained", "averaged") if engine.average is not None else ("trained",):
        with engine.averaged_weights() if name == "averaged" else contextlib.nullcontext():
            batches = validation_batches(dialogues(40), sequence_length=LENGTH, micro_batch=2, world=world)  # type: ignore[arg-type]
            figures = evaluate(engine.forward, batches, world)
            assert figures is not None
            found |= {f"{name} {key}": value for key, value in figures.items()}
    return found


def preferred(recipe: Recipe, world: World) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps of DPO, against log-probabilities that the starting model gave."""
    engine = engine_for(recipe, world)
    scores: list[Tensor] = []
    engine.objective = ScoreObjective(scores, engine.decoder.context)
    passes = [reference_pass(recipe, pairs(), world)]  # type: ignore[arg-type]
    reference = take_reference(engine.forward, scores, passes, world)
    assert len(reference.rows) == len(reference.values) == 24  # each pair once
    engine.objective = PairObjective(reference, PreferenceSection(length_normalised=True), engine.decoder.context)
    return steps(engine, recipe, world, data=pairs(), count=3)


def engine_parity(folder: str) -> None:
    """Losses within 2e-5 and gradients within 1e-4 of one process, for every case; validations and DPO too."""
    dist.init_process_group("gloo")
    for name, sections in CASES.items():
        world = world_of(4, sections["parallel"]["context"])
        recipe = recipe_for(sections["parallel"]["strategy"], 4 // world.batches, **sections)
        engine = engine_for(recipe, world)
        found = *steps(engine, recipe, world), measured(engine, world)
        if world.is_main:
            single = recipe_for("single", 4, **{key: value for key, value in sections.items() if key != "parallel"})
            truth = engine_for(single, alone())
            compare(name, found, (*steps(truth, single, alone()), measured(truth, alone())))
        dist.barrier()
    for method in ("ulysses", "ring"):
        world = world_of(4, 2)
        found = preferred(recipe_for("fsdp2", 2, parallel={"context": 2, "context_method": method}), world)
        if world.is_main:
            compare(f"DPO, {method}", (*found, {}), (*preferred(recipe_for("single", 4), alone()), {}))
        dist.barrier()
    communication(folder)


class Collectives(TorchDispatchMode):
    """Counts the collectives that this rank starts, and their bytes: of the larger side, whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "wrap_tensor_autograd"):
            self.calls[name] += 1
            self.bytes[name] += max(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def communication(folder: str) -> None:
    """Collectives of a step: those of weights do not depend on the context, those of attention are as in docs/engines.md."""
    head, layers, tokens = 8 * 4, 2, 4 * LENGTH  # bytes of one head of a token; tokens of all ranks in a step
    weights: dict[str, dict[str, int]] = {}
    for context, method in ((1, "auto"), (2, "ulysses"), (4, "ulysses"), (2, "ring"), (4, "ring")):
        world = world_of(4, context)
        recipe = recipe_for("fsdp2", 4 // world.batches, parallel={"context": context, "context_method": method})
        engine = engine_for(recipe, world)
        options = {"sequence_length": LENGTH, "micro_batch": recipe.train.micro_batch, "seed": 1, "prefetch": 0}
        micro = [next(iter(PackedStream(dialogues(), **options, **world.place())))]
        engine.forward_backward(micro)  # the first step is another one: FSDP2 learns the order of the layers
        with Collectives() as found:
            engine.forward_backward(micro)
        calls, sizes = dict(found.calls), dict(found.bytes)
        exchanges, moved = calls.pop("all_to_all_single", 0), sizes.pop("all_to_all_single", 0)
        own = tokens // 4  # tokens of a rank, with any context
        if context == 1:
            wanted = (0, 0)
        elif method == "ulysses":
            key_heads = math.lcm(2, context)
            wanted = (4 * layers, 2 * layers * own * head * (4 + 2 * key_heads + 4))
        else:
            messages = layers * ((context - 1) + (context - 1) + context)  # forward; backward: keys, and their gradients
            wanted = (messages, messages * own * head * 4)
        assert (exchanges, moved) == wanted, (context, method, exchanges, moved, wanted)
        weights.setdefault("calls", calls)
        weights.setdefault("bytes", sizes)
        assert weights == {"calls": calls, "bytes": sizes}, (context, method, calls, sizes)
        if world.is_main:
            print(f"context {context} {method}: {calls} {sizes}, attention {exchanges} calls {moved} bytes")
    dist.barrier()


def compare(name: str, found: tuple[Any, Any, Any], wanted: tuple[Any, Any, Any]) -> None:
    """Losses, gradients and figures of a validation."""
    losses, gradients, figures = found
    off = max(abs(a - b) / b for a, b in zip(losses, wanted[0], strict=True))
    gap = max(float((gradients[key] - g).norm() / g.norm()) for key, g in wanted[1].items())
    print(f"{name}: loss {off:.1e}, gradient {gap:.1e}")
    assert off < 2e-5, (name, off)
    assert gap < 1e-4, (name, gap)
    assert set(figures) == set(wanted[2])
    for key, value in wanted[2].items():
        assert math.isclose(figures[key], value, rel_tol=2e-5), (name, key, figures[key], value)


def long_dialogue(folder: str) -> None:
    """One step on one dialogue of 131,072 tokens, full attention, of which each of two ranks holds a half."""
    dist.init_process_group("gloo")
    T, world = 131_072, world_of(2, 2)
    ids = np.arange(T) % 7 + 1
    data = MemoryDataset([("long", ids, np.arange(T) > 0)], vocab_size=16)
    shape = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    sections = {"data": {"sequence_length": T}, "model": shape | {"head_dim": 8, "context": T}}
    recipe = recipe_for("ddp", 1, **sections, parallel={"context": 2})
    engine = engine_for(recipe, world)
    batch = next(iter(PackedStream(data, sequence_length=T, prefetch=0, **world.place())))
    assert (batch.tokens.numel(), batch.max_seqlen, batch.step_loss_tokens) == (T // 2, T, T - 1)
    before = world.sum([float(engine.forward_backward([batch]).loss_sum)])[0] / batch.step_examples
    engine.step(1e-2)
    with torch.no_grad():
        after = world.sum([float(engine.forward(batch).loss_sum)])[0] / batch.step_examples
    assert after < before - 0.3
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"131,072 tokens: loss {before:.4f}, then {after:.4f}; {memory} MiB in this process")


def compiled_layers(folder: str) -> None:
    """Compiled layers divide batches as layers that are not, with and without recomputation."""
    dist.init_process_group("gloo")
    world = world_of(2, 2)
    for method, recompute in (("ring", "selective"), ("ring", False), ("ulysses", "selective"), ("ulysses", True)):
        torch._dynamo.reset()
        found = []
        for compiled in (False, True):
            train = {"compile": compiled, "compile_backend": "aot_eager", "activation_checkpointing": recompute}
            recipe = recipe_for("fsdp2", 2, parallel={"context": 2, "context_method": method}, train=train)
            found.append((*steps(engine_for(recipe, world), recipe, world), {}))
        compare(f"compiled {method} {recompute}", found[1], found[0])
    dist.barrier()
