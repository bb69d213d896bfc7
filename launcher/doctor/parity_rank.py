"""What each process of a parity group does (see parity.py): the same few steps in another way, compared by rank 0.

It uses the trainer's own parts: PackedStream divides the data, build_engine makes the engine. Padded cases split the stream's
batches into one row of PACK_TOKENS per dialogue.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from chatmill.files import replace_text

from ...data.shards.memory import MemoryDataset
from ...data.stream import IGNORE, ROW_MULTIPLE, PackedBatch, PackedStream
from ...trainer.adapters.prepare import prepare, trained_parameters
from ...trainer.adapters.sources import AdaptedSource, NewAdapter
from ...trainer.config import KernelSection, ModelConfig, Recipe
from ...trainer.distributed.world import World
from ...trainer.engine.choose import build_engine
from ...trainer.engine.engine import Engine
from ...trainer.model.decoder import Decoder
from .parity_case import INTERPRETED_STEPS, PACK_TOKENS, PACKS, STEPS, VOCABULARY, Case

LR = 1e-2
SHAPE = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    context=PACK_TOKENS,
    initializer_range=0.15,
)
WIDER = SHAPE.model_copy(update={"hidden_size": 64, "intermediate_size": 64, "head_dim": 32})  # rows of whole nf4 blocks
KERNELS = {
    "reference": KernelSection(attention="reference", cross_entropy="reference", elementwise="reference"),
    "torch": KernelSection(attention="torch", cross_entropy="torch", elementwise="reference"),
    "triton": KernelSection(attention="triton", cross_entropy="triton", elementwise="triton"),
    "auto": KernelSection(),
}


def run_cases(rank: int, world_size: int, engine: str, group: Path, reference: Path) -> None:
    """All cases of one engine and world size, one after the other in this process; rank 0 writes one file per case."""
    torch.set_num_threads(1)
    world = join(rank, world_size, engine, group / "rendezvous")
    cases = [Case(**words) for words in json.loads((group / "cases.json").read_text(encoding="utf-8"))]
    for number, case in enumerate(cases):
        losses, gradients = train_case(case, dataclasses.replace(world, context=case.context))
        if not world.is_main:
            continue
        found: dict[str, Any] = {"losses": losses}
        if group == reference:
            save_file(gradients, reference / f"gradients-{case.weights}.safetensors")
        expected = load_file(reference / f"gradients-{case.weights}.safetensors")
        assert set(gradients) == set(expected), sorted(set(gradients) ^ set(expected))
        # torch's max keeps a NaN, Python's may drop it
        found["gradient"] = float(torch.stack([(gradients[n] - g).norm() / g.norm() for n, g in expected.items()]).max())
        replace_text(group / f"{number}.json", json.dumps(found))
    if dist.is_initialized():
        dist.barrier()  # no rank may leave while another still gathers


def join(rank: int, world_size: int, engine: str, meeting: Path) -> World:
    """The process group of one group, with a rendezvous in a file, because a port could be taken."""
    use_cuda = torch.cuda.is_available() and torch.cuda.device_count() >= world_size
    device = torch.device("cuda", rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if engine == "single":
        return World(0, 1, 0, 1, device, "none")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}  # DeepSpeed reads them
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # read, never used: the group exists already
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    options: dict[str, Any] = {"device_id": device} if use_cuda else {}
    dist.init_process_group(
        backend, init_method=meeting.as_uri(), rank=rank, world_size=world_size, timeout=timedelta(minutes=10), **options
    )
    return World(rank, world_size, rank, world_size, device, backend)


def train_case(case: Case, world: World) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of STEPS steps (nats per supervised token, over all ranks) and the first step's full gradients, on the CPU."""
    shape, adapted = SHAPE, {}
    if case.weights != "full":
        shape = WIDER
        base = {"checkpoint": "parity", "base_precision": "nf4" if case.weights == "nf4" else "fp32"}
        adapted = {"model": shape.model_dump() | base, "adapter": {"rank": 4, "init": "pissa"}}  # B is not 0: A has a gradient
    recipe = Recipe.model_validate(
        {
            "data": {"sequence_length": PACK_TOKENS},
            "model": shape.model_dump(),
            "optimizer": {"lr": LR},
            "train": {
                "precision": "fp32",
                "micro_batch": PACKS // (world.batches * case.accumulation),
                "accumulation": case.accumulation,
                "activation_checkpointing": case.checkpointing,
            },
            "parallel": {"strategy": case.engine, "context": case.context, "context_method": case.method},
            **adapted,
        }
    )
    torch.manual_seed(0)
    model = Decoder(shape, KERNELS[case.kernels])
    model.set_recompute(case.checkpointing)
    model.init_weights(0)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepare(model, recipe)
    engine = build_engine(recipe, model, world)
    if recipe.adapter is not None:
        held = MemorySource(weights)
        engine.load_model(AdaptedSource(held, NewAdapter(held, model, recipe.adapter, 0), recipe.adapter.scale))
    batches = stream(recipe, world)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    steps = INTERPRETED_STEPS if case.kernels == "triton" else STEPS
    for step in range(steps):
        micro = list(islice(batches, case.accumulation))
        if case.layout == "padded":
            micro = [padded(batch) for batch in micro]
        if step + 1 < steps:
            loss_sum = engine.forward_backward(micro).loss_sum
        else:  # nothing would be compared after its backward pass
            engine.model.eval()
            with torch.no_grad():
                loss_sum = torch.stack([engine.forward(batch).loss_sum for batch in micro]).sum()
        losses.append(world.sum([float(loss_sum)])[0] / micro[0].step_loss_tokens)
        if step == 0:
            gradients = full_gradients(engine)
        if step + 1 < steps:
            engine.step(LR)
    return losses, gradients


class MemorySource:
    """Tensors in memory, as the source that an engine loads from."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self, group: str = "model") -> list[str]:
        """Their names."""
        return list(self._tensors) if group == "model" else []

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self._tensors[name].flatten()[start:stop]


def dialogues(count: int = 400) -> MemoryDataset:
    """Dialogues of 3 to 30 tokens (some are cut at PACK_TOKENS), token ids from 1 on, about half of them supervised."""
    rng = np.random.default_rng(7)
    made: list[tuple[str, Any, Any]] = []
    for i in range(count):
        length = int(rng.integers(3, 31))
        mask = rng.random(length) < 0.5
        mask[0], mask[1] = False, True
        made.append((f"d{i}", rng.integers(1, VOCABULARY, length), mask))
    return MemoryDataset(made, vocab_size=VOCABULARY)


def stream(recipe: Recipe, world: World) -> Iterator[PackedBatch]:
    """This rank's share of the packs."""
    return iter(
        PackedStream(
            dialogues(),
            sequence_length=PACK_TOKENS,
            micro_batch=recipe.train.micro_batch,
            accumulation=recipe.train.accumulation,
            **world.place(),
            seed=1,
            prefetch=0,
        )
    )


def padded(batch: PackedBatch) -> PackedBatch:
    """The same dialogues, each at the start of its own row of PACK_TOKENS, the rest of the row a segment of padding."""
    bounds = batch.cu_seqlens.tolist()
    spans = [(a, b) for a, b in pairwise(bounds) if bool((batch.tokens[a:b] != 0).any())]
    spans = spans or [(0, PACK_TOKENS)]  # a micro-batch of padding alone still counts
    T = len(spans) * PACK_TOKENS
    tokens, positions = torch.zeros(T, dtype=torch.int32), torch.zeros(T, dtype=torch.int32)
    targets = torch.full((T,), IGNORE, dtype=torch.int64)
    edges = [0]
    for row, (a, b) in enumerate(spans):
        at, length = row * PACK_TOKENS, b - a
        tokens[at : at + length], targets[at : at + length] = batch.tokens[a:b], batch.targets[a:b]
        positions[at : at + length] = torch.arange(length)
        positions[at + length : at + PACK_TOKENS] = torch.arange(PACK_TOKENS - length)
        edges += [at + length] if length == PACK_TOKENS else [at + length, at + PACK_TOKENS]
    valid = (targets != IGNORE).nonzero().flatten().to(torch.int32)
    assert len(valid) == batch.loss_tokens
    rows = torch.full((max(1, -(-len(valid) // ROW_MULTIPLE)) * ROW_MULTIPLE,), -1, dtype=torch.int32)
    rows[: len(valid)] = valid
    return dataclasses.replace(
        batch,
        tokens=tokens,
        targets=targets,
        positions=positions,
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        rows=rows,
        max_seqlen=max(b - a for a, b in pairwise(edges)),
        tile_maps=None,
    )


def full_gradients(engine: Engine) -> dict[str, Tensor]:
    """Every trained parameter's whole gradient, fp32 on the CPU; collective."""
    found = {}
    is_zero = engine.recipe.parallel.strategy.startswith("zero")
    for name, parameter in trained_parameters(engine.decoder):
        if is_zero:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter).reshape(getattr(parameter, "ds_shape", parameter.shape))
        else:
            assert parameter.grad is not None, name
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name] = gradient.detach().float().cpu().clone()
    return found
