"""The layouts that a number of GPUs allows, the fastest that fits, and why.

ranked = rank_layouts(estimator, gpu, 16, context=8192.0)
chosen, reasons = recommend(ranked, gpu, recipe)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chatmill.formatting import number

from ..config import ModelConfig, Recipe
from .hardware import GIB, Gpu
from .memory import Estimator, MemoryUse, recomputed_share
from .step_time import RECOMPUTED, Layout, Load, Network, Recompute, StepTime, predict_step

WHY = {
    "single": "there is nothing to divide",
    "ddp": "every GPU holds the whole model and only gradients travel, once per step",
    "fsdp2": "weights, gradients and optimizer are sharded; weights travel in every pass",
}
TIE = 0.03  # of the time: less is within the prediction's error, and the layout that communicates less comes first


@dataclass(frozen=True)
class RankedLayout:
    """One layout. memory: of one GPU at the recipe's micro-batch. largest: packs of its largest. step: None with offload.

    accumulation: with which a step has as many tokens as the recipe's (to the nearest whole number).
    """

    layout: Layout
    accumulation: int
    memory: MemoryUse
    fits: bool
    largest: int
    step: StepTime | None


def candidates(gpus: int, engines: Sequence[str], network: Network, asked: int = 1) -> list[Layout]:
    """Layouts of all GPUs, in order of their communication. A context stays within a node, unless the recipe asks for it."""
    if gpus == 1:
        return [Layout("single")] if "single" in engines else []
    found = [Layout("ddp", replicas=gpus)] if "ddp" in engines else []
    if "fsdp2" in engines:
        node = network.gpus_per_node
        if gpus > node and gpus % node == 0:
            found.append(Layout("fsdp2", replicas=gpus // node, shards=node))
        found.append(Layout("fsdp2", shards=gpus))
    found += [Layout(engine, shards=gpus) for engine in ("zero1", "zero2", "zero3") if engine in engines]
    contexts = sorted({c for c in (2, 4, 8) if network.gpus_per_node % c == 0} | ({asked} - {1}))
    for c in (c for c in contexts if gpus % c == 0):
        found += [Layout("ddp", replicas=gpus // c, context=c)] if "ddp" in engines else []
        found += [Layout("fsdp2", shards=gpus // c, context=c)] if "fsdp2" in engines else []
    return found


def rank_layouts(
    estimator: Estimator, gpu: Gpu, gpus: int, engines: Sequence[str], *, context: float, network: Network | None = None
) -> tuple[RankedLayout, ...]:
    """Those that fit first, the fastest first. context: mean attended length of a token."""
    network = network or Network()
    recipe, config = estimator.recipe, estimator.config
    load = load_of(recipe, config, context, estimator.loss_share)
    found = []
    for layout in candidates(gpus, engines, network, recipe.parallel.context):
        c = layout.context
        shared = gpus if layout.engine == "ddp" else layout.shards * c
        memory = estimator.memory(layout.engine, shared, context=c)
        largest = estimator.largest_micro_batch(layout.engine, shared, gpu.memory_bytes, context=c)
        accumulation = max(1, round(load.accumulation * c / recipe.parallel.context))
        step = None
        if recipe.parallel.offload == "none":
            same = replace(load, accumulation=accumulation)
            step = predict_step(config, estimator.parts, gpu, layout, same, network)
        fits = memory.total <= gpu.memory_bytes
        found.append(RankedLayout(layout, accumulation, memory, fits, largest, step))
    order = {id(ranked): k for k, ranked in enumerate(found)}
    best = min((r.step.seconds / r.step.tokens for r in found if r.step and r.fits), default=0.0)

    def rank(ranked: RankedLayout) -> tuple[bool, float, int]:
        per_token = ranked.step.seconds / ranked.step.tokens if ranked.step else 0.0
        return not ranked.fits, best if per_token <= best * (1 + TIE) else per_token, order[id(ranked)]

    return tuple(sorted(found, key=rank))


def load_of(recipe: Recipe, config: ModelConfig, context: float, loss_share: float) -> Load:
    """What a micro-batch of the recipe computes."""
    train = recipe.train
    kind = "full" if train.activation_checkpointing is True else str(train.activation_checkpointing or "none")
    again, share = RECOMPUTED[kind], recomputed_share(train, config)
    scaled = Recompute(share * again.products, share * again.attention, share * again.traffic)
    tokens = train.micro_batch * recipe.data.sequence_length
    return Load(tokens, context, train.accumulation, loss_share, scaled)


def recommend(ranked: Sequence[RankedLayout], gpu: Gpu, recipe: Recipe) -> tuple[RankedLayout | None, tuple[str, ...]]:
    """The first that fits, and the reasons."""
    reasons = [
        f"{r.layout} does not fit: {_need(r, gpu)} at micro_batch={recipe.train.micro_batch}, largest {r.largest}"
        for r in ranked
        if not r.fits
    ]
    fitting = [r for r in ranked if r.fits]
    if not fitting:
        hints = [] if recipe.train.activation_checkpointing else ["train.activation_checkpointing=true"]
        largest = max((r.largest for r in ranked), default=0)
        hints += [f"train.micro_batch={largest}"] if largest else ["more GPUs"]
        return None, (*reasons, f"try {' or '.join(hints)}")
    first = fitting[0]
    why = WHY.get(first.layout.engine, "the optimizer's state is sharded")
    reasons.append(f"{first.layout} fits: {_need(first, gpu)}; {why}")
    if first.step and len(fitting) > 1 and (other := fitting[1]).step:
        reasons.append(
            f"predicted {first.step.seconds:.3g} s per step against {other.step.seconds:.3g} of {other.layout}; "
            f"{100 * first.step.exposed / first.step.seconds:.1f} % of it waits for communication"
        )
    return first, tuple(reasons)


def _need(ranked: RankedLayout, gpu: Gpu) -> str:
    return f"{ranked.memory.total / GIB:.1f} of {gpu.memory_bytes / GIB:.0f} GiB"


def table(ranked: Sequence[RankedLayout], flops_per_token: float, gpu: Gpu) -> list[str]:
    """Lines for people: the predicted step of each layout and what it consists of."""
    parts = ("products", "attention", "traffic", "loss", "optimizer", "exposed")
    lines = [f"{'layout, fastest first':<34}{'s/step':>8}{'tok/s/GPU':>11}{'MFU':>7}{'GiB':>8}  " + "  ".join(parts) + "  (%)"]
    for r in ranked:
        if r.step is None:
            lines.append(f"{r.layout!s:<34}  not predicted with offload{'' if r.fits else '   does not fit'}")
            continue
        speed, total = r.step.tokens_per_s_per_gpu, r.step.seconds
        shares = "  ".join(f"{100 * getattr(r.step, part) / total:>{len(part)}.1f}" for part in parts)
        lines.append(
            f"{r.layout!s:<34}{total:>8.3g}{number(round(speed)):>11}{100 * speed * flops_per_token / gpu.bf16_flops:>6.1f}%"
            f"{r.memory.total / GIB:>8.1f}  {shares}{'' if r.fits else '   does not fit'}"
        )
    return lines


def named(ranked: RankedLayout, recipe: Recipe) -> tuple[str, ...]:
    """The overrides that ask for a layout with as many tokens per step as the recipe has."""
    layout = ranked.layout
    words = [f"parallel.strategy={layout.engine}"]
    if layout.engine == "fsdp2" and layout.replicas > 1:
        words.append(f"parallel.replicas={layout.replicas}")
    if layout.context != recipe.parallel.context:
        words.append(f"parallel.context={layout.context}")
    if ranked.accumulation != recipe.train.accumulation:
        words.append(f"train.accumulation={ranked.accumulation}")
    return tuple(words)
