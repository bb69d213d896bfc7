"""Bytes on one GPU at the largest moment of a step, for any engine, number of processes and micro-batch.

Memory of one GPU, in bytes, for N parameters on w GPUs (c: bytes of the compute dtype; AdamW; derived from what each engine
keeps, measured in tests/trainer/plan/test_plan.py):

    engine    weights   gradients          optimizer     buffers            frozen weights (parts.py) come on top, sharded alike
    single    4 N       4 N                8 N           -
    ddp       4 N       4 N (8 N)          8 N           -                                      (): with accumulation
    fsdp2     4 N/w     4 N/w (+ 4 N)      8 N/w         top c, three layers of weights c, one unit's gradients c + 4
    zero1     c N       4 N                12 N/w        gradients in the compute dtype: 2 N
    zero2     c N       4 N/w              12 N/w        one bucket: N elements, at most 5e8
    zero3     c N/w     4 N/w              12 N/w        one bucket, weights gathered ahead (up to 1e9)

Activations and the loss's workspace come from the real model, run on fake tensors (memory_trace.py). At the largest moment of a
step all activations are there (at the loss), or all gradients (at the update), or one layer's activations and all gradients but
its own (at the end of the backward pass, where layers are recomputed): the largest sum counts. `margin`, 5 % of
everything but weights and optimizer, is for fragmentation; `context` is for the driver, cuBLAS and NCCL.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ..config import ModelConfig, Recipe, TrainSection
from .parts import ModelParts, parts_of

CONTEXT = {False: 6 << 27, True: 5 << 28}  # driver and cuBLAS 0.75 GiB; with NCCL 1.25 GiB
MARGIN = 0.05
LOGITS = 600_000_000  # most bytes of logits that the loss kernel holds at once (kernels/tuning/linear_cross_entropy.json)
BUCKET, LIVE = 500_000_000, 1_000_000_000  # ZeRO's largest reduce_bucket_size and its stage3_max_live_parameters, in elements


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one GPU at the largest moment of a step, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss_workspace: int
    buffers: int
    margin: int
    context: int

    @property
    def tensors(self) -> int:
        """What torch.cuda.max_memory_allocated would report: without margin and context."""
        return self.total - self.margin - self.context

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())


class Estimator:
    """Memory of a recipe for any engine, world size and micro-batch; traces are made once per shape."""

    def __init__(
        self, recipe: Recipe, config: ModelConfig, loss_share: float = 1.0, device: Literal["cpu", "gpu"] = "gpu"
    ) -> None:
        self.recipe, self.config, self.loss_share, self.device = recipe, config, loss_share, device
        self._traces: dict[tuple[bool, int], tuple[int, int, int]] = {}
        self.parts = parts_of(recipe, config)
        self.state_bytes = optimizer_bytes(recipe, self.parts)

    def activations(self, low_precision_weights: bool, micro_batch: int) -> tuple[int, int, int]:
        """(activations, loss workspace, those of the first layer's backward pass) in bytes of a micro-batch.

        Traced for the recipe's and for 1 and 2 packs, linear beyond.
        """
        if micro_batch in (1, 2, self.recipe.train.micro_batch):
            return self._trace(low_precision_weights, micro_batch)
        one, two = (self._trace(low_precision_weights, packs) for packs in (1, 2))
        activations, workspace, last = (a + (micro_batch - 1) * (b - a) for a, b in zip(one, two, strict=True))
        return activations, min(workspace, max(two[1], 2 * one[1] - two[1] + LOGITS)), last

    def _trace(self, low_precision_weights: bool, micro_batch: int) -> tuple[int, int, int]:
        key = (low_precision_weights, micro_batch)
        if key not in self._traces:
            from .memory_trace import estimate_step

            tokens = micro_batch * self.recipe.data.sequence_length
            train = self.recipe.train
            kinds = [train.activation_checkpointing] if (share := recomputed_share(train, self.config)) else [False]
            if 0 < share < 1:
                kinds.append(False)
            traces = [
                estimate_step(
                    self.config,
                    tokens=tokens,
                    rows=max(128, -(-round(tokens * self.loss_share) // 128) * 128),
                    precision=train.precision,
                    device=self.device,
                    checkpointing=kind,
                    low_precision_weights=low_precision_weights,
                    recipe=self.recipe,
                )
                for kind in kinds
            ]
            first, other = traces[0], traces[-1]  # linear between all layers recomputed and none
            activations = round(share * first.activations + (1 - share) * other.activations)
            self._traces[key] = (activations, max(t.workspace for t in traces), first.last)
        return self._traces[key]

    def memory(self, engine: str, world_size: int, micro_batch: int | None = None, context: int = 1) -> MemoryUse:
        """The largest of the three moments. context: processes that divide the tokens, and so the activations."""
        micro_batch = micro_batch or self.recipe.train.micro_batch
        bf16 = self.recipe.train.precision == "bf16"
        activations, workspace, last = self.activations(bf16 and engine not in ("single", "ddp"), micro_batch)
        activations, last = activations // context, last // context
        moments = [
            self._fill(engine, world_size, activations, workspace, at_update=False),
            self._fill(engine, world_size, last, 0, at_update=True, first_layer=True),
            self._fill(engine, world_size, 0, 0, at_update=True),
        ]
        return max(moments, key=lambda memory: memory.total)

    def _fill(
        self, engine: str, w: int, activations: int, workspace: int, *, at_update: bool, first_layer: bool = False
    ) -> MemoryUse:
        parts, c = self.parts, 2 if self.recipe.train.precision == "bf16" else 4
        n, frozen = parts.trained, parts.frozen_bytes
        many = self.recipe.train.accumulation > 1
        state = self.state_bytes
        unit = max(parts.top.trained, parts.layer.trained)
        weights, gradients, optimizer, buffers = 4 * n + frozen, 4 * n, state, 0
        if engine == "single":
            gradients = 4 * n if at_update or many else 0
        elif engine == "ddp":
            gradients = (8 if many else 4) * n
        elif engine == "fsdp2":
            weights, optimizer = (4 * n + frozen) // w, state // w
            gradients = (4 * n // w if at_update or many else 0) + (4 * n if many else 0)
            buffers = parts.top.gathered_bytes(c) + 3 * parts.layer.gathered_bytes(c) + (unit * (c + 4) if at_update else 0)
        else:
            held = c * (n + parts.frozen_dense)
            weights = held if engine != "zero3" else held // w
            optimizer = (state + 4 * n) // w
            gradients = 4 * n if engine == "zero1" and c == 2 else 4 * n // w
            buffers = 2 * n if engine == "zero1" and c == 2 else min(n, BUCKET) * c
            if engine == "zero3":
                buffers += c * min(n + parts.frozen_dense, LIVE)
        if first_layer and not many and engine in ("single", "fsdp2"):  # its gradients, and an untied embedding's, come last
            missing = parts.layer.trained + (0 if self.config.tied_embeddings else parts.embedding)
            gradients -= 4 * missing // (w if engine == "fsdp2" else 1)
        if self.recipe.train.ema is not None:
            optimizer += 4 * n // (1 if engine in ("single", "ddp") else w)
        if self.recipe.parallel.offload != "none" and engine not in ("single", "ddp"):
            optimizer = 0  # in fsdp2 and zero3 also the shards of weights, kept as a reserve
        moving = gradients + activations + workspace + buffers
        context = CONTEXT[w > 1]
        return MemoryUse(weights, gradients, optimizer, activations, workspace, buffers, round(MARGIN * moving), context)

    def largest_micro_batch(self, engine: str, world_size: int, limit: int, context: int = 1) -> int:
        """Packs of the largest micro-batch within `limit` bytes; 0 if not even one fits."""

        def fits(packs: int) -> bool:
            return self.memory(engine, world_size, packs, context).total <= limit

        if not fits(1):
            return 0
        one, two = (self.memory(engine, world_size, packs, context) for packs in (1, 2))
        slope = max(1, two.total - one.total)
        packs = max(1, min(1 << 14, 1 + (limit - one.total) // slope))
        while packs < 1 << 14 and fits(packs + 1):  # linear except for the cap on logits
            packs += 1
        while packs > 1 and not fits(packs):
            packs -= 1
        return packs


def optimizer_bytes(recipe: Recipe, parts: ModelParts) -> int:
    """State of the optimizer for all that is trained: two fp32 moments, one (Muon's matrices) or two of 8 bits with scales."""
    if recipe.optimizer.name == "muon":
        return 4 * parts.trained_matrices + 8 * (parts.trained - parts.trained_matrices)
    if recipe.optimizer.name == "adamw8bit":
        return round(2 * (1 + 4 / 256) * parts.trained)
    return 8 * parts.trained


def recomputed_share(train: TrainSection, config: ModelConfig) -> float:
    """Share of the layers that are recomputed in the backward pass."""
    layers = train.activation_checkpointing_layers or config.layers
    return min(layers, config.layers) / config.layers if train.activation_checkpointing else 0.0
