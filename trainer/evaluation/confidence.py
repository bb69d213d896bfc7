"""Confidence intervals and paired significance by resampling dialogues.

    sums = Sums.of([{"nll": 31.5, "tokens": 10}, ...])                        # one record per dialogue
    interval(lambda s: s["nll"] / s["tokens"], sums, make_draws(N, R, seed))  # -> Interval(value, low, high)

A dialogue is the unit: its tokens and turns depend on each other, dialogues do not. N of the N dialogues are drawn with
replacement, R times; the interval goes from percentile 2.5 to 97.5 of the metric of the summed rows. Two models are
compared on the same draws, with the interval of the difference and

    p = min(1, 2 (min(#{d <= 0}, #{d >= 0}) + 1) / (R + 1))      two-sided, of "there is no difference"

Everything is float64 on the host, in the order of the rows: no world size and no batch size can change it.
Source: Koehn 2004 (W04-3250); Efron & Tibshirani 1993, chapter 13.
Shapes: N dialogues, K columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Figures = Mapping[str, NDArray[np.float64]]
Metric = Callable[[Figures], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Second model minus first. p: probability of a difference this far from 0 if there were none."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class Sums:
    """What each dialogue adds to the metrics: rows Float64["N K"] with named columns."""

    columns: tuple[str, ...]
    rows: NDArray[np.float64]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, float]]) -> Sums:
        """From one mapping per dialogue; a column that a dialogue lacks is 0."""
        columns = tuple(dict.fromkeys(name for record in records for name in record))
        rows = [[record.get(name, 0.0) for name in columns] for record in records]
        return cls(columns, np.array(rows, dtype=np.float64).reshape(len(records), len(columns)))

    def total(self) -> Figures:
        """The sums over all dialogues, added one after the other: each of shape (1,)."""
        running = np.zeros(len(self.columns))
        for row in self.rows:
            running = running + row
        return {name: running[k : k + 1] for k, name in enumerate(self.columns)}

    def resampled(self, draws: NDArray[np.float64]) -> Figures:
        """The sums of each resample: each of shape (R,). draws: how often each dialogue was drawn, Float64["R N"]."""
        drawn = draws @ self.rows
        return {name: drawn[:, k] for k, name in enumerate(self.columns)}


def make_draws(dialogues: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each dialogue is drawn, Float64["R N"]; a pure function of its arguments."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.stack(
        [np.bincount(generator.integers(0, dialogues, dialogues), minlength=dialogues) for _ in range(resamples)]
    ).astype(np.float64)


def interval(metric: Metric, sums: Sums, draws: NDArray[np.float64]) -> Interval:
    """The metric over all dialogues with its interval."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        spread = metric(sums.resampled(draws))
        value = float(metric(sums.total())[0])
    low, high = _percentiles(spread)
    return Interval(value, low, high)


def difference(metric: Metric, first: Sums, second: Sums, draws: NDArray[np.float64]) -> Difference:
    """second minus first, paired: row i of both is the same dialogue."""
    if len(first.rows) != len(second.rows):
        raise ValueError(f"difference: {len(first.rows)} and {len(second.rows)} dialogues; expected the same ones.")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        spread = metric(second.resampled(draws)) - metric(first.resampled(draws))
        value = float(metric(second.total())[0] - metric(first.total())[0])
    low, high = _percentiles(spread)
    spread = spread[np.isfinite(spread)]
    tail = min(int((spread <= 0).sum()), int((spread >= 0).sum()))
    return Difference(value, low, high, min(1.0, 2 * (tail + 1) / (len(spread) + 1)))


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
