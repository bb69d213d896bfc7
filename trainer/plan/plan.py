"""`chatmill plan RECIPE`: whether it fits, with which engine, and how long it takes.

    chatmill plan 8b --gpu h100 --gpus 16 [--mfu 0.4] [--json] [section.field=value ...]

memory.py counts the bytes, layouts.py ranks the layouts by the step that step_time.py predicts. With --mfu the time is tokens x
FLOPs per token / (GPUs x peak x MFU), no recomputation counted in the FLOPs; see docs/metrics.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chatmill.config import ConfigError
from chatmill.formatting import duration

from ..adapter_config import QUANTISED
from ..config import ModelConfig, Recipe
from .hardware import GIB, Gpu
from .layouts import RankedLayout, named, rank_layouts, recommend, table
from .memory import Estimator, MemoryUse, recomputed_share
from .parts import parts_of
from .step_time import Layout, Network

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
MFU = 0.40  # published trainers reach 0.33 to 0.58 on H100 and H200 with bf16
# full: forward once more, so 6 of 8 FLOPs are useful; selective keeps the attention's results: a little better
RECOMPUTE = {"full": 0.75, "selective": 0.8}


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
    """Everything that `chatmill plan` prints. layouts: of all GPUs, the best first. overrides: what asks for `layout`."""

    gpu: Gpu
    gpus: int
    parameters: dict[str, int]
    active: int
    micro_batch: int
    loss_share: float
    fits: tuple[Fit, ...]
    layouts: tuple[RankedLayout, ...]
    work: RunCost
    engine: str | None
    layout: Layout | None
    overrides: tuple[str, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


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
        active=config.active_parameters(),
        micro_batch=recipe.train.micro_batch,
        loss_share=loss_share,
        fits=tuple(fits),
        layouts=ranked,
        work=work,
        engine=chosen.layout.engine if chosen else None,
        layout=chosen.layout if chosen else None,
        overrides=named(chosen, recipe) if chosen else (),
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
    step_tokens = max(1, gpus // recipe.parallel.context) * train.accumulation * train.micro_batch * recipe.data.sequence_length
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
    parts = "  ".join(f"{name} {n:,}" for name, n in plan.parameters.items() if name != "total" and n)
    count = plan.parameters["total"]
    active = "" if plan.active == count else f", {plan.active:,} active in a token"
    lines.append(f"parameters  {count:,}{active}  ({parts})")
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
    words = plan.overrides or ("none fits",)
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
