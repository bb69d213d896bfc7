"""The engine for one device, DDP and FSDP2 (HSDP too).

    engine = TorchEngine(recipe, model, world)

Bf16 is computed under autocast, or by FSDP2's mixed-precision policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from chatmill.config import ConfigError

from ...data.stream import PackedBatch
from ..adapters.prepare import kept_parameters, trained_parameters
from ..adapters.sources import load_frozen
from ..checkpoint.files import Share
from ..checkpoint.sharding import TensorSource, copy_from, shares_of, states_by_parameter
from ..config import Recipe
from ..distributed.world import World
from ..model.language_model import LanguageModel, LossOutput
from ..optim.ema import GROUP, PREFIX, WeightAverage, swapped
from ..optim.optimizer import build_optimizer, restore_state, saved_state, set_rate
from ..parallel.context import join_context
from ..parallel.grid import device_mesh
from ..parallel_config import grid_of
from .ddp_buckets import settle_buckets
from .engine import Objective, StepSums, check_average, proof, run_model, sum_micro_batches


class TorchEngine:
    """A model wrapped for its strategy, with its optimizer; see the protocol Engine (engine.py)."""

    def __init__(self, recipe: Recipe, model: LanguageModel, world: World) -> None:
        self.recipe, self.world, self.decoder = recipe, world, model
        self.grid = grid_of(recipe.parallel, world.world_size)
        # fully_shard moves and shards layer by layer: the whole model need not fit
        if recipe.parallel.strategy != "fsdp2" and any(p.device.type != world.device.type for p in model.parameters()):
            model.to(world.device)
        if recipe.train.compile:
            model.compile_layers(recipe.train.compile_backend)
        self.model: nn.Module = self._wrap(model)
        self.gathers = isinstance(self.model, FSDPModule)
        self.objective: Callable[[PackedBatch], Objective] | None = None
        copies = dist.group.WORLD if recipe.parallel.strategy == "ddp" else None
        self.optimizer = build_optimizer(model, recipe.optimizer, recipe.train.precision, copies)
        decay = recipe.train.ema
        self.average = WeightAverage([p for _, p in trained_parameters(model)], decay) if decay is not None else None
        self._gradients_seen = False
        self._norm: Tensor | None = None

    def _wrap(self, model: LanguageModel) -> nn.Module:
        parallel, world, grid = self.recipe.parallel, self.world, self.grid
        if parallel.strategy == "single":
            return model
        mesh = device_mesh(grid, world.device.type) if parallel.strategy == "fsdp2" or grid.context > 1 else None
        if mesh is not None:
            model.context = join_context(self.recipe, model.config, mesh)
        if parallel.strategy == "ddp":
            ids = [world.device.index] if world.device.type == "cuda" else None
            replicas = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            if not self.recipe.train.compile:  # it would compile every layer again, for another length
                with self.autocast():
                    settle_buckets(replicas, world.device)
            return replicas
        assert parallel.strategy == "fsdp2", parallel.strategy  # zero* has an engine of its own (zero.py)
        assert mesh is not None
        bf16 = self.recipe.train.precision == "bf16"
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
        pin = world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pin) if parallel.offload == "cpu" else OffloadPolicy()
        for layer in model.layers:
            reshard = parallel.reshard_after_forward
            fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
        register_fsdp_forward_method(model, "cached_logits")
        return model

    def describe(self) -> dict[str, Any]:
        recipe, parameters = self.recipe, list(self.decoder.parameters())
        strategy = recipe.parallel.strategy
        sharded = sum(isinstance(p, DTensor) for p in parameters)
        expected = len(parameters) if strategy == "fsdp2" else 0
        if sharded != expected:
            raise ConfigError(f"{sharded} of {len(parameters)} parameters are sharded, {strategy} needs {expected}")
        layouts = {(str(p.placements), tuple(p.device_mesh.shape)) for p in parameters if isinstance(p, DTensor)}
        homes = {p.device.type for p in parameters}
        home = "cpu" if recipe.parallel.offload == "cpu" else self.world.device.type
        if homes != {home} or len(layouts) > 1:
            raise ConfigError(f"parameters are on {sorted(homes)} in layouts {sorted(layouts)}; expected {home} and one layout")
        grid = self.grid
        shards = grid.shards * grid.context if strategy == "fsdp2" else 1
        state = "8-bit" if recipe.optimizer.name == "adamw8bit" else "fp32"
        return proof(
            self,
            [p for _, p in trained_parameters(self.decoder)],
            engine=type(self.model).__name__,
            sharded_parameters=f"{sharded} of {len(parameters)}",
            sharding=f"parameters, gradients and optimizer: {shards} shard(s) x {self.world.world_size // shards} copies",
            optimizer=f"{type(self.optimizer).__name__} ({state} state)",
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.train.precision == "bf16" and self.recipe.parallel.strategy != "fsdp2":
            return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def forward(self, batch: PackedBatch) -> LossOutput:
        return run_model(self, batch)

    def forward_backward(self, batches: Sequence[PackedBatch]) -> StepSums:
        """Communication happens on the last micro-batch only."""
        return sum_micro_batches(self, batches, self._micro_batch)

    def _micro_batch(self, batch: PackedBatch, scale: float, last: bool) -> LossOutput:
        with self._gradient_sync(last):
            if self.world.device.type == "cpu":  # a GPU's kernels round that gradient to bf16, and are measured without it
                self.decoder.set_loss_scale(scale)
            output = self.forward(batch)
            (output.loss_sum * scale).backward()
        return output

    @contextlib.contextmanager
    def _gradient_sync(self, last: bool) -> Iterator[None]:
        if isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
        else:
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(last)
            yield

    def clip(self) -> None:
        self._check_gradients()
        clip = self.recipe.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(
            [p for _, p in trained_parameters(self.decoder)], clip if clip is not None else float("inf")
        )
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, lr: float) -> float:
        if self._norm is None:
            self.clip()
        assert self._norm is not None
        value = float(self._norm)
        self._norm = None
        if value == value and value != float("inf"):  # a step with NaN or inf gradients is skipped on every rank alike
            self.update(lr)
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def update(self, lr: float) -> None:
        """Move the weights and their average by the gradients as they are; `step` decides whether."""
        set_rate(self.optimizer, lr)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()

    def _check_gradients(self) -> None:
        """Before the first update: every trained weight has an fp32 gradient, sharded as the weight is. Raises ConfigError."""
        if self._gradients_seen:
            return
        for name, parameter in trained_parameters(self.decoder):
            grad = parameter.grad
            if grad is None or grad.dtype != torch.float32 or type(grad) is not type(parameter.data):
                found = "none" if grad is None else f"{type(grad).__name__} {grad.dtype}"
                raise ConfigError(f"the gradient of {name} is {found}; expected {type(parameter.data).__name__} torch.float32")
        self._gradients_seen = True

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        return swapped(self._exchange)

    def _exchange(self) -> None:
        assert self.average is not None
        self._reshard()
        self.average.exchange()

    def _reshard(self) -> None:
        """Drop gathered weights. FSDP2 keeps the root's after a forward pass without backward (a validation).

        The module then has other Parameter objects than the optimizer, and they would not follow a change of the shards.
        """
        for module in self.decoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shares(self) -> Iterator[Share]:
        return shares_of(self._held(), self.world.rank, self.world.world_size)

    def _held(self) -> Iterator[tuple[str, str, Tensor]]:
        """(group, name, tensor) of all that a checkpoint keeps; DTensors where it is sharded."""
        self._reshard()
        named = trained_parameters(self.decoder)
        for name, parameter in kept_parameters(self.decoder):
            yield "model", name, parameter.detach()
        for name, tensor in self.decoder.constants():
            yield "model", name, tensor
        for name, parameter in named:
            for key, value in saved_state(self.optimizer, parameter).items():
                yield "optimizer", f"{name}.{key}", value
        if self.average is not None:
            for (name, _), tensor in zip(named, self.average.tensors, strict=True):
                yield GROUP, PREFIX + name, tensor

    def load_model(self, source: TensorSource) -> None:
        self._reshard()
        for name, parameter in trained_parameters(self.decoder):
            copy_from(source, name, parameter)
        load_frozen(self.decoder, source)
        if self.average is not None:
            self.average.reset()

    def load_optimizer(self, source: TensorSource) -> None:
        self._reshard()
        stored = states_by_parameter(source)
        for name, parameter in trained_parameters(self.decoder):
            restore_state(self.optimizer, parameter, name, stored.get(name, []), source)

    def load_average(self, source: TensorSource) -> None:
        assert self.average is not None
        names = [name for name, _ in trained_parameters(self.decoder)]
        check_average(source, names)
        for name, average in zip(names, self.average.tensors, strict=True):
            copy_from(source, PREFIX + name, average)

    def discard(self) -> None:
        self._norm = None
        self.optimizer.zero_grad(set_to_none=True)
