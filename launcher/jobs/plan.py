"""`chatmill plan`: the figures of trainer/plan/plan.py for a recipe, with what its data set and its checkpoint say.

    chatmill plan 8b --gpu h100 --gpus 16 train.micro_batch=2 [--json]

Tracing the memory of activations needs torch, but no GPU. On a login node without torch one line says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatmill.config import ConfigError

from ...trainer.config import ModelConfig, Recipe
from ...trainer.plan.hardware import Gpu, find_gpu, known_gpu
from .resolve import model_shape, resolve

if TYPE_CHECKING:
    from ...trainer.plan.plan import Plan

DEFAULT_GPU = "h100"
NO_TORCH = "plan        not made: torch is not installed here (it is needed to trace the model's activations, no GPU is)"


@dataclass(frozen=True)
class DataFacts:
    """loss_share: supervised tokens / tokens. context: sum of length^2 / sum of length, in tokens. tokens: of one pass."""

    loss_share: float
    context: float
    tokens: int


def plan_command(options: argparse.Namespace) -> int:
    """The command: prints the plan; returns 1 if no engine fits, 2 without torch."""
    gpus = options.gpus or 1
    resolved = resolve(options.recipe, options.overrides, gpus)
    if importlib.util.find_spec("torch") is None:
        print(NO_TORCH)
        return 2
    from ...trainer.plan.plan import as_json, show
    from ...trainer.plan.step_time import Network

    recipe = resolved.recipe
    shape = model_shape(recipe)
    notes = list(resolved.notes)
    if shape is None:
        # the default shape would be planned, which nobody asked for
        if recipe.model.model_fields_set <= {"checkpoint", "base_precision"}:
            raise ConfigError(
                f"model.checkpoint: {recipe.model.checkpoint} holds no config.json, so the model's size is not known.\n"
                "Make the checkpoint with `chatmill import`, or write the model's shape (model.layers=..., ...)."
            )
        notes.append(f"{recipe.model.checkpoint} cannot be read from here: the shape written in the recipe is used")
        shape = recipe.model.shape()
    facts = data_facts(recipe)
    if facts is None:
        notes.append(f"{', '.join(recipe.data.paths.values())} cannot be read from here: every token is taken to carry loss")
    if recipe.train.precision == "fp32":
        notes.append("the time is for bf16: train.precision=fp32 is several times slower on a GPU")
    network = Network()
    if options.gpus_per_node is not None:
        network = replace(network, gpus_per_node=int(at_least("--gpus-per-node", options.gpus_per_node, 1)))
    if options.node_gbits is not None:
        network = replace(network, bytes_per_gpu=at_least("--node-gbits", options.node_gbits, 0.001) * 1e9 / 8)
    gpu = find_gpu(options.gpu or DEFAULT_GPU)
    plan = _plan(recipe, shape, gpu, gpus, facts, mfu=options.mfu, network=network, notes=notes)
    print(as_json(plan) if options.json else show(plan))
    return int(plan.engine is None)


def at_least(option: str, value: float, least: float) -> float:
    """The value, or ConfigError."""
    if not least <= value < math.inf:
        raise ConfigError(f"{option} {value}: expected at least {least}")
    return value


def plan_lines(recipe: Recipe, world_size: int, gpu_type: str | None) -> str:
    """For `chatmill launch --dry-run`: the recipe's own engine at the world size that would start."""
    if importlib.util.find_spec("torch") is None:
        return NO_TORCH
    from ...trainer.plan.plan import show

    shape = model_shape(recipe)
    if shape is None:
        return f"plan        not made: {recipe.model.checkpoint} cannot be read from here"
    gpu = known_gpu(gpu_type or DEFAULT_GPU)
    notes = [] if gpu_type and gpu else [f"planned for a GPU of type {DEFAULT_GPU}: give another with --gpu-type"]
    only = {"engines": [recipe.parallel.strategy], "world_sizes": [world_size]}
    return show(_plan(recipe, shape, gpu or find_gpu(DEFAULT_GPU), world_size, data_facts(recipe), notes=notes, **only))


def _plan(recipe: Recipe, shape: ModelConfig, gpu: Gpu, gpus: int, facts: DataFacts | None, **options: Any) -> Plan:
    from ...trainer.plan.plan import make_plan

    if facts is not None:
        options |= {"loss_share": facts.loss_share, "context": facts.context}
    return make_plan(recipe, shape, gpu, gpus, steps=count_steps(recipe, gpus, facts), **options)


def data_facts(recipe: Recipe) -> DataFacts | None:
    """From the indices of the training data, with lengths cut at the pack; None if a data set cannot be read."""
    from ...data.shards.dataset import TokenDataset

    lengths, losses = [], []
    for path in recipe.data.paths.values():
        try:
            dataset = TokenDataset.open(Path(path), "train")
        except (ConfigError, OSError):
            return None
        lengths.append(np.asarray(dataset.lengths, dtype=np.float64))
        losses.append(float(np.sum(dataset.loss_tokens)))
        dataset.close()
    whole = np.concatenate(lengths)
    if not whole.size:
        return None
    cut = np.minimum(whole, recipe.data.sequence_length)
    share = sum(losses) / float(whole.sum())
    return DataFacts(share, float((cut * cut).sum() / cut.sum()), int(cut.sum()))


def count_steps(recipe: Recipe, world_size: int, facts: DataFacts | None) -> int | None:
    """Approximate steps if the recipe sets epochs or tokens (padding is not known here); None leaves train.steps."""
    train = recipe.train
    groups = max(1, world_size // recipe.parallel.context)
    step_tokens = groups * train.accumulation * train.micro_batch * recipe.data.sequence_length
    wanted = [train.tokens] if train.tokens is not None else []
    if train.epochs is not None and facts is not None:
        wanted.append(train.epochs * facts.tokens)
    if not wanted:
        return None
    steps = math.ceil(min(wanted) / step_tokens)
    return min(steps, train.steps) if "steps" in train.model_fields_set else steps
