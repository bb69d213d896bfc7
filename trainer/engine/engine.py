"""What the loop needs of a training engine: a model wrapped for its strategy, with its optimizer.

    engine = build_engine(recipe, model, world)  # choose.py: TorchEngine for single, ddp and fsdp2; ZeroEngine for zero1 to 3
    sums = engine.forward_backward(batches)      # the gradients of one optimizer step
    norm = engine.step(lr)

The loss of a step is  sum over all supervised tokens of the step / their GLOBAL number  (over ranks and accumulation), so every
split of a global batch gives the same gradients. Engines average gradients over ranks; the factor world_size undoes it.
Master weights, gradient reductions and the optimizer are fp32; `precision=bf16` computes in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chatmill.config import ConfigError

from ...data.stream import PackedBatch
from ..adapters.prepare import frozen_parameters, held_bytes, trained_parameters
from ..checkpoint.files import Share
from ..checkpoint.sharding import TensorSource
from ..config import Recipe
from ..distributed.world import World
from ..model.language_model import LanguageModel, LossOutput
from ..optim.ema import GROUP, PREFIX, WeightAverage

Objective = Callable[[Tensor], LossOutput]  # what LanguageModel.forward hands its token losses Float["T"] to


@dataclass(frozen=True)
class StepSums:
    """What one step's forward passes summed up on THIS rank (tensors stay on the device until `.item()`)."""

    loss_sum: Tensor
    correct: Tensor


class Engine(Protocol):
    """decoder: the bare model; model: the same, wrapped. objective makes the loss of a batch; None: likelihood.

    average: the moving average of the weights (train.ema). gathers: a forward pass gathers weights, so every rank must join it.
    """

    recipe: Recipe
    world: World
    decoder: LanguageModel
    model: nn.Module
    objective: Callable[[PackedBatch], Objective] | None
    average: WeightAverage | None
    gathers: bool

    def describe(self) -> dict[str, Any]:
        """What is sharded how and in which dtypes: printed at the start and kept in environment.json. Raises ConfigError
        where it is not what the recipe asks for."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The compute precision of a forward pass."""

    def forward(self, batch: PackedBatch) -> LossOutput:
        """Loss sum and counts of one batch, through the wrapped model."""

    def forward_backward(self, batches: Sequence[PackedBatch]) -> StepSums:
        """Gradients of one optimizer step over this rank's micro-batches."""

    def clip(self) -> None:
        """Start to measure and clip the gradients without waiting for the device: waiting for the loss later covers both."""

    def step(self, lr: float) -> float:
        """Clip (unless `clip` was called), update, zero; returns the gradient norm before clipping.

        Where the norm is not finite, the update is skipped on every rank alike.
        """

    def discard(self) -> None:
        """Throw away the gradients of this step instead of calling `step`: weights and optimizer stay as they are."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within this context the model has the averaged weights (train.ema); the trained ones come back exactly."""

    def shares(self) -> Iterator[Share]:
        """This rank's part of all that a checkpoint keeps; over all ranks every element comes once. No communication."""

    def load_model(self, source: TensorSource) -> None:
        """Set the weights from a checkpoint that any engine at any world size wrote. The average starts from them."""

    def load_optimizer(self, source: TensorSource) -> None:
        """Restore the optimizer's state, whichever engine wrote it; each rank reads its own elements. Raises ConfigError."""

    def load_average(self, source: TensorSource) -> None:
        """Set the averaged weights from a checkpoint's `ema` tensors. Raises ConfigError where it holds none."""


def run_model(engine: Engine, batch: PackedBatch, objective: Callable[[PackedBatch], Objective] | None = None) -> LossOutput:
    """Engine.forward: the batch on its device, through the wrapped model. objective: in place of the engine's own."""
    objective = objective or engine.objective
    batch = batch.to(engine.world.device, non_blocking=True)
    if engine.recipe.train.compile:
        _mark_varying(batch)
    with engine.autocast():
        output: LossOutput = engine.model(
            batch.tokens,
            batch.positions,
            batch.cu_seqlens,
            targets=batch.targets,
            rows=batch.rows,
            tile_maps=batch.tile_maps,
            max_seqlen=batch.max_seqlen,
            **({} if objective is None else {"objective": objective(batch)}),
            **({} if batch.division is None else {"division": batch.division}),
        )
    return output


def sum_micro_batches(
    engine: Engine, batches: Sequence[PackedBatch], work: Callable[[PackedBatch, float, bool], LossOutput]
) -> StepSums:
    """Engine.forward_backward. work: both passes of a micro-batch, given the factor on its loss and whether it is the last."""
    engine.model.train()
    scale = engine.world.world_size / max(1, batches[0].step_examples)
    losses, corrects = [], []
    for number, batch in enumerate(batches, 1):
        output = work(batch, scale, number == len(batches))
        losses.append(output.loss_sum.detach())
        corrects.append(output.correct.detach())
    return StepSums(reduce(torch.add, losses), reduce(torch.add, corrects))


def proof(engine: Engine, masters: Iterable[Tensor], /, **facts: Any) -> dict[str, Any]:
    """What `describe` says for every engine, with its own facts. masters: the weights that the optimizer updates (local
    shards under ZeRO); the frozen ones are counted from the decoder. Raises ConfigError where they are not fp32."""
    recipe, device = engine.recipe, engine.world.device
    dtypes = {weight.dtype for weight in masters}
    if dtypes != {torch.float32}:
        raise ConfigError(
            f"master weights must be float32, found {sorted(map(str, dtypes))}: the engine lowered their precision"
        )
    context = engine.decoder.context
    return {
        "strategy": recipe.parallel.strategy,
        **({} if context is None else {"context": context.size, "context_method": context.method}),
        "world_size": engine.world.world_size,
        "backend": engine.world.backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **facts,
        **trained_and_frozen(engine),
        "parameter_dtype": "float32",
        "compute_dtype": {"bf16": "bfloat16", "fp32": "float32"}[recipe.train.precision],
        "gradient_dtype": "float32",
        "reduce_dtype": "float32",
        "loss_dtype": "float32",
        "offload": recipe.parallel.offload,
        "activation_checkpointing": engine.decoder.recompute,
        "compile": recipe.train.compile_backend if recipe.train.compile else "none",
        "ema": recipe.train.ema,
        "threads": torch.get_num_threads(),
    }


def trained_and_frozen(engine: Engine) -> dict[str, Any]:
    """Tensors, elements and bytes of what is trained and of what is frozen, by precision; {} where nothing is frozen."""
    frozen = frozen_parameters(engine.decoder)
    if not frozen:
        return {}
    found: dict[str, Any] = {}
    for kind, named in (("trained", trained_parameters(engine.decoder)), ("frozen", frozen)):
        by_dtype = {dtype: {"elements": elements, "bytes": size} for dtype, elements, size in held_bytes(named)}
        found[kind] = {"tensors": len(named), "by_dtype": by_dtype}
    base = engine.recipe.model.base_precision
    return found | {"base_precision": base}


def check_average(source: TensorSource, names: Iterable[str]) -> None:
    """Refuse a checkpoint that does not hold the average of every weight. Raises ConfigError."""
    missing = sorted({PREFIX + name for name in names} - set(source.names(GROUP)))
    if missing:
        raise ConfigError(f"the checkpoint holds no averaged weights for {', '.join(missing[:3])}: train.ema came later")


def _mark_varying(batch: PackedBatch) -> None:
    """Tell torch.compile that the number of documents and of attention tiles differs between batches: fewer compilations."""
    maps = batch.tile_maps.values() if isinstance(batch.tile_maps, Mapping) else ()
    whole = () if batch.division is None else (batch.division.cu_seqlens,)
    for tensor in (batch.cu_seqlens, *whole, *(tile_map.data for tile_map in maps)):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
