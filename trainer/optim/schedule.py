"""Learning-rate schedules: pure functions of the position, so resuming needs no scheduler state.

    lr(p) = peak * p / w                             p <= w      (warm-up)
          = peak * ratio((p - w) / (n - w))          p >  w      (decay from 1 to min_ratio)
          = peak * max(min_ratio, sqrt(w / p))       inverse_sqrt

p: position of an optimizer step, w: end of the warm-up, n: end of the run, all in one unit. In steps, p is the step's number
counted from 1, w = warmup_steps + 1 and n = train.steps. In tokens, p counts the tokens seen, including those of the step. A
run whose steps all have the same number of tokens has the same rates either way.
Sources: cosine arXiv:1608.03983, warm-up and inverse_sqrt arXiv:1706.03762, WSD arXiv:2404.06395.
"""

from __future__ import annotations

import math

from ..config import Recipe, ScheduleSection


def learning_rate(
    step: int, steps: int, peak: float, schedule: ScheduleSection, tokens: int = 0, total_tokens: int | None = None
) -> float:
    """Learning rate of optimizer step `step` (0-based) out of `steps`.

    tokens: seen before and in this step, without padding. total_tokens: the number over which the rate falls
    (Recipe.schedule_tokens). Both matter only with schedule.unit=tokens.
    """
    if schedule.unit == "tokens":
        if total_tokens is None:
            raise ValueError("a schedule by tokens needs total_tokens")
        return rate(tokens, schedule.warmup_tokens, total_tokens, peak, schedule)
    return rate(step + 1, schedule.warmup_steps + 1, steps, peak, schedule)


def same_rates(before: Recipe, after: Recipe, done: int) -> bool:
    """Whether the first `done` steps have the same learning rates with train.steps of either recipe."""
    if after.schedule.unit == "tokens":
        return before.schedule_tokens == after.schedule_tokens
    old, new = (
        [learning_rate(step, recipe.train.steps, recipe.optimizer.lr, recipe.schedule) for step in range(done)]
        for recipe in (before, after)
    )
    return old == new


def rate(position: int, warmup: int, total: int, peak: float, schedule: ScheduleSection) -> float:
    """Learning rate at a position in (0, total]; warmup and total in the same unit. Past total it stays at its last value."""
    low = schedule.min_ratio
    if position < warmup:
        return peak * position / warmup
    if schedule.name == "inverse_sqrt":
        return peak * max(low, math.sqrt(warmup / position))
    progress = min(1.0, (position - warmup) / max(1, total - warmup))
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
