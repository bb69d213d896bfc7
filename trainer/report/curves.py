"""The curves of the run report: which measures are drawn, from which columns, how smoothed.

markup = curves([run])          # one run; with several, each is a line of every chart
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ...data.report.charts import Chart, Series, draw
from .reading import RunRecord, real

# metrics.jsonl key -> title, note, axis starts at zero
MEASURES: dict[str, tuple[str, str, bool]] = {
    "lr": ("Learning rate", "", True),
    "grad_norm": ("Gradient norm", "before clipping", True),
    "tokens_per_s": ("Throughput", "tokens per second", True),
    "mfu": ("Model FLOPs utilisation", "share of the device's peak", True),
    "memory_peak_bytes": ("Peak memory", "bytes on one device", True),
    "data_wait_share": ("Waiting for data", "share of the time", True),
    "tflops_per_device": ("Work done", "TFLOP/s per device", True),
    "required_mfu": ("Required utilisation", "only the rows that carry loss counted in the head", True),
    "padding_share": ("Padding", "share of the packs", True),
    "loss_share": ("Supervised tokens", "share of the tokens", True),
    "memory_reserved_bytes": ("Reserved memory", "bytes on one device", True),
}
# shown by another chart already, or of no interest as a curve
TOLD = {"tokens_per_s_per_device", "required_tflops_per_device"}
NOT_CHARTED = {"step", "loss", "tokens", "loss_tokens", "time", "epoch", "total_tokens", *MEASURES, *TOLD}


def curves(runs: Sequence[RunRecord]) -> list[str]:
    """The charts as HTML, the loss first and tall."""
    drawn = [chart for chart in (*_main_charts(runs), *_small_charts(runs)) if chart is not None]
    return [chart.html(tall=chart.title == "Loss", hover=True) for chart in drawn]


def label_of(runs: Sequence[RunRecord], run: RunRecord) -> str:
    """The name of a run, or its path if several have the name."""
    same = [r for r in runs if r.name == run.name]
    return run.name if len(same) == 1 else str(run.path)


def _column(rows: dict[int, dict[str, Any]], key: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    picked = [(float(step), real(row[key])) for step, row in rows.items() if key in row]
    return tuple(x for x, _ in picked), tuple(y for _, y in picked)


def _main_charts(runs: Sequence[RunRecord]) -> Iterable[Chart | None]:
    loss: list[Series] = []
    perplexity: list[Series] = []
    accuracy: list[Series] = []
    alone = len(runs) == 1
    for slot, run in enumerate(runs):
        label = "" if alone else f"{label_of(runs, run)}: "
        of_validation = 1 if alone else slot
        x, y = _column(run.train, "loss")
        if len(x) >= 20:
            if alone:
                loss.append(Series("each step", x, y, slot, "faint"))
            loss.append(Series(f"{label}training", x, smooth(y, max(2.0, len(x) / 40)), slot))
        else:
            loss.append(Series(f"{label}training", x, y, slot))
        for into, name, key in (
            (loss, "validation", "loss"),
            (perplexity, "validation perplexity", "perplexity"),
            (accuracy, "token accuracy", "accuracy"),
        ):
            into.append(Series(f"{label}{name}", *_column(run.evals, key), of_validation, "points"))
            if alone and run.averages:
                into.append(Series(f"{name}, averaged weights", *_column(run.averages, key), 2, "points"))
    yield draw("Loss", loss, note="nats per token")
    yield draw("Validation perplexity", perplexity, note="lower is better")
    yield draw("Validation accuracy", accuracy, note="share of next tokens guessed right")


def _small_charts(runs: Sequence[RunRecord]) -> Iterable[Chart | None]:
    numeric = {k for row in runs[0].train.values() for k, v in row.items() if math.isfinite(real(v))}
    others = {k: (k.replace("_", " ").capitalize(), "", False) for k in sorted(numeric - NOT_CHARTED)}
    for key, (title, note, zero) in (MEASURES | others).items():
        series = []
        for slot, run in enumerate(runs):
            x, y = _column(run.train, key)
            name = title.lower() if len(runs) == 1 else label_of(runs, run)
            if key in ("grad_norm", "tokens_per_s") and len(x) >= 60 and len(runs) == 1:
                series.append(Series("each step", x, y, slot, "faint"))
                series.append(Series("running median", x, running_median(y, len(x) // 20), slot))
            else:
                series.append(Series(name, x, y, slot))
        yield draw(title, series, note=note, zero=zero)


def smooth(values: Sequence[float], half_life: float) -> tuple[float, ...]:
    """Exponential moving average without start bias; NaNs are passed over and leave gaps."""
    keep, total, weight, out = 0.5 ** (1.0 / max(half_life, 1e-9)), 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            out.append(math.nan)
            continue
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return tuple(out)


def running_median(values: Sequence[float], width: int) -> tuple[float, ...]:
    """Median of the `width` values around each one: a single spike leaves no trace in it. NaNs leave gaps."""
    half = max(1, width // 2)
    out = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        out.append(statistics.median(near) if math.isfinite(value) else math.nan)
    return tuple(out)
