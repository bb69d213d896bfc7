"""`chatmill plan RECIPE`: whether it fits, with which engine, and how long it takes.

    chatmill plan 8b --gpu h100 --gpus 16 [--mfu 0.4] [--json] [section.field=value ...]

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
Time: step_time.py predicts the step of each layout. With --mfu it is tokens x FLOPs per token / (GPUs x peak x MFU), no
recomputation counted in the FLOPs; see docs/metrics.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from chatmill.config import ConfigError
from chatmill.formatting import duration

from ..adapter_config import QUANTISED
from ..config import ModelConfig, Recipe
from .hardware import GIB, Gpu
from .layouts import RankedLayout, named, rank_layouts, recommend, recomputed_share, table
from .parts import ModelParts, parts_of
from .step_time import Layout, Network

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
MFU = 0.40  # published trainers reach 0.33 to 0.58 on H100 and H200 with bf16
# full: forward once more, so 6 of 8 FLOPs are useful; selective keeps the attention's results: a little better
RECOMPUTE = {"full": 0.75, "selective": 0.8}
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


@dataclass(frozen=True)
class Fit:
    """One engine at one world size. memory: at the recipe's micro-batch. largest: packs of the largest micro-batch, or 0."""

    engine: str
    world_size: int
    memory: MemoryUse
    fits: bool
    largest: int


@dataclass(frozen=True)
class RunCost:
    """The whole run on `gpus` GPUs. tokens: at most (whole packs). context: mean of length^2 / length over documents.

    assumed: the MFU was given (`--mfu`) or is the usual one; otherwise the time is that of the fastest layout.
    """

    steps: int
    step_tokens: int
    tokens: int
    context: float
    flops_per_token: float
    mfu: float
    step_seconds: float
    hours: float
    gpu_hours: float
    assumed: bool = True


@dataclass(frozen=True)
class Plan:
    """Everything that `chatmill plan` prints. layouts: of all GPUs, the best first."""

    gpu: Gpu
    gpus: int
    parameters: dict[str, int]
    micro_batch: int
    accumulation: int
    loss_share: float
    fits: tuple[Fit, ...]
    layouts: tuple[RankedLayout, ...]
    work: RunCost
    engine: str | None
    layout: Layout | None
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


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


def make_plan(
    recipe: Recipe,
    config: ModelConfig,
    gpu: Gpu,
    gpus: int,
    *,
    mfu: float | None = None,
    engines: Sequence[str] = ENGINES,
    world_sizes: Sequence[int] | None = None,
    loss_share: float = 1.0,
    context: float | None = None,
    steps: int | None = None,
    network: Network | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Memory of each engine at each world size (default: the powers of two up to `gpus`), the time of each layout, the best.

    loss_share: supervised tokens / tokens. context: mean document length weighted by length (default: whole packs).
    mfu: assume it for the time, whatever the layout.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: expected a share between 0 and 1, such as 0.4")
    estimator = Estimator(recipe, config, loss_share)
    sizes = list(world_sizes) if world_sizes else sorted({gpus, *(1 << k for k in range(gpus.bit_length()) if 1 << k <= gpus)})
    fits = []
    refused = ("zero1", "zero2", "zero3") if recipe.model.base_precision in QUANTISED else ()
    for engine in (engine for engine in engines if engine not in refused):
        for size in [1] if engine == "single" else [s for s in sizes if s > 1 or gpus == 1]:
            memory = estimator.memory(engine, size)
            largest = estimator.largest_micro_batch(engine, size, gpu.memory_bytes)
            fits.append(Fit(engine, size, memory, memory.total <= gpu.memory_bytes, largest))
    context = float(recipe.data.sequence_length) if context is None else context
    allowed = [engine for engine in engines if engine not in refused]
    ranked = rank_layouts(estimator, gpu, gpus, allowed, context=context, network=network)
    chosen, reasons = recommend(ranked, gpu, recipe)
    step = next((r.step.seconds for r in ranked if r.step), None)
    work = count_work(recipe, config, gpu, gpus, mfu=mfu, seconds=step, context=context, steps=steps)
    return Plan(
        gpu=gpu,
        gpus=gpus,
        parameters=config.parameter_counts(),
        micro_batch=recipe.train.micro_batch,
        accumulation=recipe.train.accumulation,
        loss_share=loss_share,
        fits=tuple(fits),
        layouts=ranked,
        work=work,
        engine=chosen.engine if chosen else None,
        layout=chosen,
        reasons=reasons,
        notes=tuple(notes),
    )


def count_work(
    recipe: Recipe,
    config: ModelConfig,
    gpu: Gpu,
    gpus: int,
    *,
    context: float | None,
    mfu: float | None = None,
    seconds: float | None = None,
    steps: int | None = None,
) -> RunCost:
    """Tokens, FLOPs and time of the whole run. seconds: of a predicted step; without it or with mfu, that decides."""
    train = recipe.train
    steps = steps or train.steps
    step_tokens = gpus * train.accumulation * train.micro_batch * recipe.data.sequence_length
    context = float(recipe.data.sequence_length) if context is None else context
    parts = parts_of(recipe, config)
    flops = parts.flops_per_token(config, context)
    checkpointing = train.activation_checkpointing
    kind = "full" if checkpointing is True else str(checkpointing)
    share = recomputed_share(train, config)
    useful = 6.0 - 2.0 * parts.frozen_matrices / config.matrix_parameters()  # FLOPs per element of a matrix and token
    needed, assumed = step_tokens * flops / (gpus * gpu.bf16_flops), mfu is not None or seconds is None
    if assumed or seconds is None:
        reached = (mfu or MFU) / (1 - share + share * (1 + (1 / RECOMPUTE.get(kind, 1.0) - 1) * 6.0 / useful))
        seconds = needed / reached
    hours = steps * seconds / 3600
    every = context, flops, needed / seconds, seconds, hours, hours * gpus, assumed
    return RunCost(steps, step_tokens, steps * step_tokens, *every)


def as_json(plan: Plan) -> str:
    """The plan with its totals."""
    data: dict[str, Any] = asdict(plan)
    for fit, found in zip(data["fits"], plan.fits, strict=True):
        fit["memory"]["total"] = found.memory.total
    for layout, ranked in zip(data["layouts"], plan.layouts, strict=True):
        layout["memory"]["total"] = ranked.memory.total
        if ranked.step is not None:
            layout["step"] |= {"seconds": ranked.step.seconds, "tokens_per_s_per_gpu": ranked.step.tokens_per_s_per_gpu}
    return json.dumps(data, indent=1)


def show(plan: Plan) -> str:
    """The plan for people."""
    gib = [f"{part:>12}" for part in ("weights", "gradients", "optimizer", "activations", "loss", "buffers", "margin+ctx")]
    lines = [f"note: {note}" for note in plan.notes]
    parts = "  ".join(f"{name} {count:,}" for name, count in plan.parameters.items() if name != "total" and count)
    lines.append(f"parameters  {plan.parameters['total']:,}  ({parts})")
    lines.append(
        f"gpu         {plan.gpu.name}, {plan.gpu.memory_bytes / GIB:.0f} GiB, "
        f"{plan.gpu.bf16_flops / 1e12:.0f} TFLOP/s bf16 ({plan.gpu.source})"
    )
    lines.append(f"\nGiB of one GPU at micro_batch={plan.micro_batch}, {100 * plan.loss_share:.0f} % of the tokens with loss")
    lines.append(f"{'engine':<8}{'gpus':>5}{''.join(gib)}{'total':>9}  largest micro-batch")
    for fit in plan.fits:
        m = fit.memory
        values = (m.weights, m.gradients, m.optimizer, m.activations, m.loss_workspace, m.buffers, m.margin + m.context)
        cells = "".join(f"{value / GIB:>12.2f}" for value in values)
        largest = str(fit.largest) if fit.largest else "none"
        total = f"{m.total / GIB:>9.1f}"
        lines.append(f"{fit.engine:<8}{fit.world_size:>5}{cells}{total}  {largest}{'' if fit.fits else '   does not fit'}")
    work = plan.work
    words = named(plan.layout, plan.accumulation) if plan.layout else ["none fits"]
    if plan.layouts:
        lines += ["", *table(plan.layouts, work.flops_per_token, plan.gpu)]
    said = "assumed" if work.assumed else "predicted"
    how = (
        "recomputation taken off; --mfu sets it" if work.assumed else "of the best layout, not measured; --mfu assumes another"
    )
    lines += [
        "",
        f"steps       {work.steps:,} x {work.step_tokens:,} tokens at most = {work.tokens:,}",
        f"time        {duration(3600 * work.hours)} on {plan.gpus} GPU(s), {work.gpu_hours:.2f} GPU-hours, "
        f"{work.step_seconds:.3g} s per step",
        f"            {said}: MFU {100 * work.mfu:.1f} % ({how}), "
        f"{work.flops_per_token:.3g} FLOPs per token at a context of {work.context:,.0f}",
        "",
        f"layout      {' '.join(words)}",
        *(f"            {reason}" for reason in plan.reasons),
    ]
    return "\n".join(lines)
