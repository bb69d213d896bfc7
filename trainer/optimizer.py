"""Optimizer and learning-rate schedule.

    AdamW: m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr (m^ / (sqrt(v^) + eps) + decay w)

Weight decay falls on matrices only: norms, biases and embeddings (rows are seen at very different rates) have none.
Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
The schedule is a pure function of the step, so that resuming needs no scheduler state.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from chatmill.trainer.config import OptimizerSection, ScheduleSection


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is decayed: matrices of the layers and an untied head."""
    return parameter.ndim >= 2 and not name.startswith("embed.")


def build_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over model's parameters in two groups (decayed, not decayed), names kept in each group."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = []
    for decayed in (True, False):
        chosen = [(n, p) for n, p in named if has_decay(n, p) is decayed]
        if chosen:
            groups.append({"params": [p for _, p in chosen], "weight_decay": config.weight_decay if decayed else 0.0})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleSection) -> float:
    """Learning rate of optimizer step `step` (0-based) out of `steps`.

    Warm-up rises linearly and reaches the peak at step warmup_steps; the decay reaches min_ratio x peak at the last step.
    """
    warmup, low = schedule.warmup_steps, schedule.min_ratio
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    span = max(1, steps - 1 - warmup)
    progress = min(1.0, (step - warmup) / span)
    if schedule.name == "constant":
        ratio = 1.0
    elif schedule.name == "linear":
        ratio = 1.0 - (1.0 - low) * progress
    elif schedule.name == "cosine":
        ratio = low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    else:  # wsd: stable, then linear over the last decay_fraction
        into_decay = max(0.0, progress - (1.0 - schedule.decay_fraction)) / schedule.decay_fraction
        ratio = 1.0 - (1.0 - low) * into_decay
    return peak * ratio
