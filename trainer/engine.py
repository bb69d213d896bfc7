"""One training engine for one device, DDP and FSDP2: what the loop needs and nothing else.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from chatmill.config import ConfigError
from chatmill.data.stream import PackedBatch
from chatmill.data.tokenizer import ChatTokenizer
from chatmill.trainer.config import Recipe
from chatmill.trainer.generation import reply_to
from chatmill.trainer.model import Decoder, LossOutput
from chatmill.trainer.optimizer import build_optimizer
from chatmill.trainer.sampling import Sampling
from chatmill.trainer.world import World

SAMPLING = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.15)  # small models repeat themselves when greedy
STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class StepSums:
    """What one step's forward passes summed up on THIS rank (tensors stay on the device until `.item()`)."""

    loss_sum: Tensor
    correct: Tensor


class Engine:
    """A model wrapped for its strategy, with its optimizer."""

    def __init__(self, recipe: Recipe, model: Decoder, world: World) -> None:
        self.recipe, self.world, self.decoder = recipe, world, model
        model.to(world.device)
        self.model: nn.Module = self._wrap(model)
        self.optimizer = build_optimizer(model, recipe.optimizer)

    def _wrap(self, model: Decoder) -> nn.Module:
        strategy, world = self.recipe.parallel.strategy, self.world
        if strategy == "single":
            return model
        if strategy == "ddp":
            ids = [world.device.index] if world.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        assert strategy == "fsdp2", strategy  # zero* has an engine of its own (zero_engine.py)
        mesh = init_device_mesh(world.device.type, (world.world_size,))
        bf16 = self.recipe.train.precision == "bf16"
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "cached_logits")
        return model

    def describe(self) -> dict[str, Any]:
        """What is sharded how and in which dtypes: the proof printed at the start and kept in environment.json."""
        parameters = list(self.decoder.parameters())
        sharded = sum(isinstance(p, DTensor) for p in parameters)
        expected = len(parameters) if self.recipe.parallel.strategy == "fsdp2" else 0
        if sharded != expected:
            raise ConfigError(
                f"{sharded} of {len(parameters)} parameters are sharded, {self.recipe.parallel.strategy} needs {expected}"
            )
        return {
            "strategy": self.recipe.parallel.strategy,
            "engine": type(self.model).__name__,
            "world_size": self.world.world_size,
            "backend": self.world.backend,
            "device": self.device_name(),
            "sharded_parameters": f"{sharded} of {len(parameters)}",
            "parameter_dtype": str(parameters[0].dtype).removeprefix("torch."),
            "compute_dtype": {"bf16": "bfloat16", "fp32": "float32"}[self.recipe.train.precision],
            "reduce_dtype": "float32",
            "optimizer": type(self.optimizer).__name__ + " (fp32 state, fused)",
            "threads": torch.get_num_threads(),
        }

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
        with self.autocast():
            output: LossOutput = self.model(
                batch.tokens,
                batch.positions,
                batch.cu_seqlens,
                targets=batch.targets,
                rows=batch.rows,
                plan=batch.plan,
                max_seqlen=batch.max_seqlen,
            )
        return output

    def forward_backward(self, batches: Sequence[PackedBatch]) -> StepSums:
        """Gradients of one optimizer step over this rank's micro-batches; communication happens on the last one only."""
        self.model.train()
        scale = self.world.world_size / max(1, batches[0].step_loss_tokens)
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

    def step(self, lr: float) -> float:
        """Clip, update, zero; returns the gradient norm before clipping."""
        clip = self.recipe.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), clip if clip is not None else float("inf"))
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        value = float(norm)
        if value == value and value != float("inf"):  # a step with NaN or inf gradients is skipped on every rank alike
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def replies(self, tokenizer: ChatTokenizer, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[str, str]]:
        """Replies to single questions, sampled with a fixed seed: on rank 0, or on every rank alike where they are sharded."""
        if not (self.world.is_main or isinstance(self.model, FSDPModule)):
            return
        self.decoder.eval()
        for prompt in prompts:
            with self.autocast():
                reply = reply_to(
                    self.decoder,
                    tokenizer,
                    [{"role": "user", "content": prompt}],
                    max_new_tokens=max_new_tokens,
                    sampling=SAMPLING,
                    seed=self.recipe.train.seed,
                )
            yield prompt, reply.text

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(group, name, full tensor) of the model and the optimizer, one at a time; every rank must iterate."""
        for name, parameter in self.decoder.named_parameters():
            yield "model", name, _full(parameter)
        for name, parameter in self.decoder.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield "optimizer", f"{name}.{key}", _full(value)

    def load_optimizer(self, read: dict[str, Tensor]) -> None:
        """Restore the optimizer from full tensors (any engine or world size wrote them). Missing entries are an error."""
        for name, parameter in self.decoder.named_parameters():
            state = {}
            for key in STATE_NAMES:
                tensor = read[f"{name}.{key}"]
                if key != "step":
                    tensor = _like(tensor, parameter)
                elif parameter.device.type == "cuda":
                    tensor = tensor.to(parameter.device)
                state[key] = tensor
            self.optimizer.state[parameter] = state

    def load_model(self, read: Iterator[tuple[str, Tensor]]) -> None:
        """Copy full tensors into the (possibly sharded) parameters."""
        parameters = dict(self.decoder.named_parameters())
        with torch.no_grad():
            for name, tensor in read:
                parameters[name].copy_(_like(tensor, parameters[name]))


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    tensor = tensor.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
