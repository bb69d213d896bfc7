"""One training engine for one device, DDP and FSDP2 (HSDP too): what the loop needs and nothing else.

    engine = Engine(recipe, model, world)
    loss = engine.forward_backward(batches)      # the gradients of one optimizer step
    norm = engine.step(lr)

The loss of a step is  sum over all supervised tokens of the step / their GLOBAL number  (over ranks and accumulation), so that
every split of a global batch gives the same gradients. DDP and FSDP2 average over ranks; the factor world_size undoes it.
Master weights, gradients' reductions and the optimizer are fp32; `precision=bf16` computes in bfloat16 (autocast, or FSDP2's
mixed-precision policy).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..checkpoint.files import Share
from ..checkpoint.sharding import TensorSource, copy_from, shares_of, states_by_parameter
from ..config import Recipe
from ..distributed.world import World
from ..generation.replies import reply_to
from ..generation.sampling import Sampling
from ..model.decoder import Decoder, LossOutput
from ..optim.ema import GROUP, PREFIX, WeightAverage
from ..optim.optimizer import build_optimizer, restore_state, saved_state, set_rate
from .ddp_buckets import settle_buckets

SAMPLING = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.15)  # small models repeat themselves when greedy


@dataclass(frozen=True)
class StepSums:
    """What one step's forward passes summed up on THIS rank (tensors stay on the device until `.item()`)."""

    loss_sum: Tensor
    correct: Tensor


class Engine:
    """A model wrapped for its strategy, with its optimizer."""

    def __init__(self, recipe: Recipe, model: Decoder, world: World) -> None:
        self.recipe, self.world, self.decoder = recipe, world, model
        if recipe.parallel.strategy != "fsdp2":  # fully_shard moves and cuts layer by layer: a whole model need not fit
            model.to(world.device)
        if recipe.train.compile:
            model.compile_layers(recipe.train.compile_backend)
        self.model: nn.Module = self._wrap(model)
        self.objective: Callable[[PackedBatch], Callable[[Tensor], LossOutput]] | None = None  # None: likelihood
        copies = dist.group.WORLD if recipe.parallel.strategy == "ddp" else None
        self.optimizer = build_optimizer(model, recipe.optimizer, recipe.train.precision, copies)
        decay = recipe.train.ema
        self.average = WeightAverage(list(model.parameters()), decay) if decay is not None else None
        self._gradients_seen = False
        self._norm: Tensor | None = None

    def _wrap(self, model: Decoder) -> nn.Module:
        parallel, world = self.recipe.parallel, self.world
        if parallel.strategy == "single":
            return model
        if parallel.strategy == "ddp":
            ids = [world.device.index] if world.device.type == "cuda" else None
            replicas = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            if not self.recipe.train.compile:  # it would compile every layer once more, for another length
                with self.autocast():
                    settle_buckets(replicas, world.device)
            return replicas
        assert parallel.strategy == "fsdp2", parallel.strategy  # zero* has an engine of its own (zero_engine.py)
        mesh = shard_mesh(world, parallel.replicas)
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
        """What is sharded how and in which dtypes: the proof printed at the start and kept in environment.json."""
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
            raise ConfigError(f"parameters lie on {sorted(homes)} in layouts {sorted(layouts)}; expected {home} and one layout")
        copies = self.world.world_size if strategy == "ddp" else recipe.parallel.replicas
        shards = self.world.world_size // copies if strategy == "fsdp2" else 1
        return self.facts(
            engine=type(self.model).__name__,
            sharded_parameters=f"{sharded} of {len(parameters)}",
            sharding=f"parameters, gradients and optimizer: {shards} shard(s) x {copies} copies",
            optimizer=f"{type(self.optimizer).__name__} ({optimizer_dtype(recipe)} state)",
        )

    def facts(self, **proof: Any) -> dict[str, Any]:
        """What every engine proves alike, with what one adds. Raises ConfigError where master weights are not fp32."""
        recipe, dtypes = self.recipe, {p.dtype for p in self.masters()}
        if dtypes != {torch.float32}:
            raise ConfigError(f"master weights must be float32, found {sorted(map(str, dtypes))}: the engine downgraded them")
        return {
            "strategy": recipe.parallel.strategy,
            "world_size": self.world.world_size,
            "backend": self.world.backend,
            "device": self.device_name(),
            **proof,
            "parameter_dtype": "float32",
            "compute_dtype": {"bf16": "bfloat16", "fp32": "float32"}[recipe.train.precision],
            "gradient_dtype": "float32",
            "reduce_dtype": "float32",
            "loss_dtype": "float32",
            "offload": recipe.parallel.offload,
            "activation_checkpointing": self.decoder.recompute,
            "compile": recipe.train.compile_backend if recipe.train.compile else "none",
            "ema": recipe.train.ema,
            "threads": torch.get_num_threads(),
        }

    def masters(self) -> list[Tensor]:
        """The weights that the optimizer updates (local shards where sharded by ZeRO)."""
        return list(self.decoder.parameters())

    def device_name(self) -> str:
        """Name of the device, for people."""
        device = self.world.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The compute precision of a forward pass."""
        if self.recipe.train.precision == "bf16" and self.recipe.parallel.strategy != "fsdp2":
            return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def forward(self, batch: PackedBatch) -> LossOutput:
        """Loss sum and counts of one batch, through the wrapped model."""
        batch = batch.to(self.world.device, non_blocking=True)
        if self.recipe.train.compile:
            mark_varying(batch)
        with self.autocast():
            output: LossOutput = self.model(
                batch.tokens,
                batch.positions,
                batch.cu_seqlens,
                targets=batch.targets,
                rows=batch.rows,
                plan=batch.plan,
                max_seqlen=batch.max_seqlen,
                **({} if self.objective is None else {"objective": self.objective(batch)}),
            )
        return output

    def forward_backward(self, batches: Sequence[PackedBatch]) -> StepSums:
        """Gradients of one optimizer step over this rank's micro-batches; communication happens on the last one only."""
        self.model.train()
        scale = self.world.world_size / max(1, batches[0].step_examples)
        sums: StepSums | None = None
        for i, batch in enumerate(batches):
            with self._gradient_sync(last=i + 1 == len(batches)):
                output = self.forward(batch)
                (output.loss_sum * scale).backward()
            loss, correct = output.loss_sum.detach(), output.correct.detach()
            sums = StepSums(loss, correct) if sums is None else StepSums(sums.loss_sum + loss, sums.correct + correct)
        assert sums is not None
        return sums

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
        """Start to measure and clip the gradients, without waiting: who then waits for the loss has waited for both."""
        self._check_gradients()
        clip = self.recipe.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), clip if clip is not None else float("inf"))
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, lr: float) -> float:
        """Clip (unless `clip` was called), update, zero; returns the gradient norm before clipping."""
        if self._norm is None:
            self.clip()
        assert self._norm is not None
        value = float(self._norm)
        self._norm = None
        if value == value and value != float("inf"):  # a step with NaN or inf gradients is skipped on every rank alike
            set_rate(self.optimizer, lr)
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def _check_gradients(self) -> None:
        """Before the first update: every weight has an fp32 gradient that lies as the weight does. Raises ConfigError."""
        if self._gradients_seen:
            return
        for name, parameter in self.decoder.named_parameters():
            grad = parameter.grad
            if grad is None or grad.dtype != torch.float32 or type(grad) is not type(parameter.data):
                found = "none" if grad is None else f"{type(grad).__name__} {grad.dtype}"
                raise ConfigError(f"the gradient of {name} is {found}; expected {type(parameter.data).__name__} torch.float32")
        self._gradients_seen = True

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the model has the averaged weights (train.ema); the trained ones come back exactly."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        assert self.average is not None
        self._reshard()
        self.average.exchange()

    def _reshard(self) -> None:
        """Drop gathered weights. FSDP2 keeps the root's after a forward without backward (a validation): the module then has
        other Parameter objects than the optimizer, and they would outlive a change of the shards."""
        for module in self.decoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def replies(self, tokenizer: ChatTokenizer, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[str, str]]:
        """Replies to single questions, sampled with a fixed seed: on rank 0, or on every rank alike where they are sharded."""
        if not (self.world.is_main or isinstance(self.model, FSDPModule)):
            return
        self.decoder.eval()
        for prompt in prompts:
            # not compiled: every length of a prompt and of its cache would be another shape
            with self.autocast(), torch.compiler.set_stance("force_eager"):
                reply = reply_to(
                    self.decoder,
                    tokenizer,
                    [{"role": "user", "content": prompt}],
                    max_new_tokens=max_new_tokens,
                    sampling=SAMPLING,
                    seed=self.recipe.train.seed,
                )
            yield prompt, reply.text

    def shards(self) -> Iterator[tuple[str, str, Tensor]]:
        """(group, name, tensor) of all that a checkpoint keeps, as it lies here: a DTensor where it is sharded."""
        self._reshard()
        named = list(self.decoder.named_parameters())
        for name, parameter in named:
            yield "model", name, parameter.detach()
        for name, parameter in named:
            for key, value in saved_state(self.optimizer, parameter).items():
                yield "optimizer", f"{name}.{key}", value
        if self.average is not None:
            for (name, _), tensor in zip(named, self.average.tensors, strict=True):
                yield GROUP, PREFIX + name, tensor

    def shares(self) -> Iterator[Share]:
        """This rank's part of `shards`; over all ranks every element comes once. No communication."""
        return shares_of(self.shards(), self.world.rank, self.world.world_size)

    def load_model(self, source: TensorSource) -> None:
        """Fill the (possibly sharded) parameters from a checkpoint that any engine at any world size wrote; each rank reads its
        own rows. The average starts from them."""
        self._reshard()
        for name, parameter in self.decoder.named_parameters():
            copy_from(source, name, parameter)
        if self.average is not None:
            self.average.reset()

    def load_optimizer(self, source: TensorSource) -> None:
        """Restore the optimizer's state, whoever wrote it; each rank reads its own rows. Raises ConfigError."""
        self._reshard()
        stored = states_by_parameter(source)
        for name, parameter in self.decoder.named_parameters():
            restore_state(self.optimizer, parameter, name, stored.get(name, []), source)

    def load_average(self, source: TensorSource) -> None:
        """Set the averaged weights from a checkpoint's `ema` tensors. Raises ConfigError where it holds none."""
        assert self.average is not None
        check_average(source, [name for name, _ in self.decoder.named_parameters()])
        for (name, _), average in zip(self.decoder.named_parameters(), self.average.tensors, strict=True):
            copy_from(source, PREFIX + name, average)

    def discard(self) -> None:
        """Throw the gradients of this step away instead of calling `step`: weights and optimizer stay as they are."""
        self._norm = None
        self.optimizer.zero_grad(set_to_none=True)


def mark_varying(batch: PackedBatch) -> None:
    """Tell torch.compile that the number of documents and of attention tiles differs between batches: fewer compilations."""
    plans = batch.plan.values() if isinstance(batch.plan, Mapping) else ()
    for tensor in (batch.cu_seqlens, *(plan.data for plan in plans)):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def check_average(source: TensorSource, names: Sequence[str]) -> None:
    """Refuse a checkpoint that does not hold the average of every weight. Raises ConfigError."""
    missing = sorted({PREFIX + name for name in names} - set(source.names(GROUP)))
    if missing:
        raise ConfigError(f"the checkpoint holds no averaged weights for {', '.join(missing[:3])}: train.ema came later")


def shard_mesh(world: World, replicas: int) -> DeviceMesh:
    """One dimension of shards, or replicas x shards (HSDP); neighbouring ranks hold the shards of one copy."""
    if world.world_size % replicas:
        raise ConfigError(f"parallel.replicas={replicas} does not divide the {world.world_size} processes of this run")
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    shape = (replicas, world.world_size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def optimizer_dtype(recipe: Recipe) -> str:
    """How the optimizer's state is stored, for people."""
    return "8-bit" if recipe.optimizer.name == "adamw8bit" else "fp32"
