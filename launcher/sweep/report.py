"""What a sweep found: table, best recipe, and one self-contained HTML page.

SWEEP/{best.yaml, trials.json, report.html}: history, parallel coordinates, importance of each field (PED-ANOVA,
arXiv:2304.10255) and, where `scaling` names an axis, the fitted curve metric = a + b * x^-c with a, b, c >= 0.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from chatmill.config import ConfigError
from chatmill.files import replace_texts
from chatmill.run_files import read_jsonl

from ...data.report.charts import STYLE, Axis, BarRow, Line, Series, bar_rows, draw, parallel
from .config import SweepConfig
from .study import load_optuna, open_study


@dataclass(frozen=True)
class TrialResult:
    """One trial. value: the metric at its last validation; None if it never reached one. x: its place on the scaling axis."""

    number: int
    state: str
    values: dict[str, Any]
    value: float | None
    step: int
    run: str
    seconds: float | None
    x: float | None = None
    error: str = ""


@dataclass(frozen=True)
class ScalingFit:
    """metric = a + b * x^-c, least squares. residual: root mean square; points: different x that were fitted."""

    a: float
    b: float
    c: float
    residual: float
    points: int

    def at(self, x: float) -> float:
        """The fitted metric at x."""
        return self.a + self.b * x**-self.c


def write_results(sweep: SweepConfig) -> list[TrialResult]:
    """Write trials.json, best.yaml and report.html; returns the trials, best first."""
    study = open_study(sweep)
    trials = collect(study, sweep)
    texts = {sweep.folder / "trials.json": json.dumps([asdict(t) for t in trials], indent=1) + "\n"}
    best = best_of(trials)
    if best is not None:
        texts[sweep.folder / "best.yaml"] = best_recipe(sweep, best)
    fit = fit_scaling([(t.x, t.value) for t in trials if t.state == "complete" and t.x and t.value is not None], sweep.maximise)
    texts[sweep.folder / "report.html"] = render(sweep, trials, importance(study), fit)
    replace_texts(texts)
    return trials


def collect(study: Any, sweep: SweepConfig) -> list[TrialResult]:
    """All trials of a study, complete ones first, from best to worst. Pieces of trials that were put back are left out."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        if "put_back" in trial.user_attrs:
            continue
        run = sweep.folder / "runs" / trial.user_attrs.get("run", "")
        value = trial.value if trial.value is not None else next(reversed(trial.intermediate_values.values()), None)
        if value is not None and not math.isfinite(value):  # a diverged training has no place in an order
            value = None
        seconds = trial.duration.total_seconds() if trial.duration else None
        found.append(
            TrialResult(
                number=trial.number,
                state={"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower()),
                values=dict(trial.params),
                value=value,
                step=max((line["step"] for line in read_jsonl(run / "metrics.jsonl")), default=0),
                run=str(run),
                seconds=seconds,
                x=_scaling_x(sweep, trial.params, run),
                error=str(trial.user_attrs.get("error", "")),
            )
        )
    sign = -1.0 if sweep.maximise else 1.0
    return sorted(found, key=lambda t: (t.state != "complete", t.value is None, sign * (t.value or 0.0), t.number))


def best_of(trials: Sequence[TrialResult]) -> TrialResult | None:
    """The best complete trial, of trials sorted as `collect` does."""
    return trials[0] if trials and trials[0].state == "complete" else None


def best_recipe(sweep: SweepConfig, best: TrialResult) -> str:
    """The best trial's resolved recipe as a file to train from, under a name of its own."""
    recipe = sweep.trial_recipe(best.values, f"{sweep.name}-best").model_dump(mode="json")
    recipe["run"]["dir"] = "runs"
    head = f"# Best of sweep {sweep.name}: trial {best.number}, {sweep.metric} {best.value:.6g} after {best.step} steps.\n"
    return head + yaml.safe_dump(recipe, sort_keys=False)


def importance(study: Any) -> dict[str, float]:
    """Share of each field in what separates good trials from the rest; empty with too few complete trials."""
    optuna = load_optuna()
    complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    if len(complete) < 4 or len({t.value for t in complete}) < 2:
        return {}
    shares = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in shares.items() if math.isfinite(share)}


def fit_scaling(points: Sequence[tuple[float | None, float | None]], maximise: bool = False) -> ScalingFit | None:
    """Fit a + b * x^-c to the best metric at each x; None below four different x, and for a metric that is maximised."""
    best: dict[float, float] = {}
    for x, y in points:
        if x is not None and y is not None and x > 0 and math.isfinite(y):
            best[x] = min(y, best.get(x, math.inf))
    if maximise or len(best) < 4:
        return None
    xs = np.array(sorted(best), dtype=np.float64)
    ys = np.array([best[key] for key in sorted(best)], dtype=np.float64)
    scale = xs[0]  # keeps x^-c near one, whatever the unit
    found: tuple[float, float, float, float] | None = None
    for c in np.geomspace(0.01, 3.0, 600):
        matrix = np.stack([np.ones_like(xs), (xs / scale) ** -c], axis=1)
        (a, b), *_ = np.linalg.lstsq(matrix, ys, rcond=None)
        if a < 0:  # a loss does not fall below zero: fit through a = 0
            a, b = 0.0, float((matrix[:, 1] @ ys) / (matrix[:, 1] @ matrix[:, 1]))
        if b < 0:
            continue
        residual = float(np.sqrt(np.mean((matrix @ np.array([a, b]) - ys) ** 2)))
        if found is None or residual < found[3]:
            found = (float(a), float(b) * scale**c, float(c), residual)
    return ScalingFit(*found, points=len(xs)) if found else None


def _scaling_x(sweep: SweepConfig, values: dict[str, Any], run: Path) -> float | None:
    if sweep.scaling is None:
        return None
    if sweep.scaling == "tokens":
        return max((float(m["total_tokens"]) for m in read_jsonl(run / "metrics.jsonl") if "total_tokens" in m), default=None)
    if sweep.scaling == "parameters":
        try:
            return float(sweep.trial_recipe(values, "x").model.shape().parameter_counts()["total"])
        except ConfigError:
            return None
    value = values.get(sweep.scaling)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def table(sweep: SweepConfig, trials: Sequence[TrialResult], most: int = 20) -> str:
    """The best trials for a terminal."""
    names = list(sweep.space)
    rows = [["trial", "state", sweep.metric, "step", *names]]
    for trial in trials[:most]:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        rows.append([str(trial.number), trial.state, value, str(trial.step), *(_short(trial.values.get(n)) for n in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render(sweep: SweepConfig, trials: list[TrialResult], shares: dict[str, float], fit: ScalingFit | None) -> str:
    """The page, without scripts or external resources; every word of the sweep file is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = _short
    template = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    shown = [t for t in trials if t.value is not None and math.isfinite(t.value)]
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    bars = [BarRow(name, (("kept", share),), f"{100 * share:.1f} %", "") for name, share in ranked]
    charts = [history(sweep, shown), parallel_coordinates(sweep, shown)]
    if fit:
        charts.append(scaling_chart(sweep, [t for t in shown if t.state == "complete" and t.x], fit))
    return template.render(
        sweep=sweep,
        trials=trials,
        best=best_of(trials),
        names=list(sweep.space),
        importance=Markup(bar_rows(bars)) if bars else "",
        fit=fit,
        chart_style=Markup(STYLE),
        charts=[Markup(chart) for chart in charts],
    )


def history(sweep: SweepConfig, trials: Sequence[TrialResult]) -> str:
    """The metric by trial number, a colour per state, and the line of the best so far."""
    ordered = sorted(trials, key=lambda t: t.number)
    complete = [t for t in ordered if t.state == "complete"]
    best = itertools.accumulate((t.value or 0.0 for t in complete), max if sweep.maximise else min)
    line = Series("best so far", tuple(float(t.number) for t in complete), tuple(best), slot=2)
    chart = draw(
        f"{sweep.metric} by trial", [line, *_dots(ordered)], note="a pruned trial at its last validation", x_label="trial"
    )
    return chart.html(tall=True) if chart else ""


def parallel_coordinates(sweep: SweepConfig, trials: Sequence[TrialResult]) -> str:
    """One vertical axis per field and one for the metric; a line per trial, the better the darker."""
    axes: list[Axis] = []
    heights: list[list[float]] = []
    for name in (*sweep.space, sweep.metric):
        found: list[Any] = [t.value if name == sweep.metric else t.values.get(name) for t in trials]
        if found and all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
            bend = math.log if name in sweep.space and sweep.space[name].log else float
            low, span = bend(min(found)), (bend(max(found)) - bend(min(found))) or 1.0
            axes.append(
                Axis(name, tuple({0.0: _short(min(found)), (bend(max(found)) - low) / span: _short(max(found))}.items()))
            )
            heights.append([(bend(v) - low) / span for v in found])
        else:
            words = sorted({str(v) for v in found})
            at = {word: (k + 0.5) / len(words) for k, word in enumerate(words)}
            axes.append(Axis(name, tuple((at[word], word) for word in words)))
            heights.append([at[str(v)] for v in found])
    lines = [
        Line(tuple(h[i] for h in heights), _label(trial), _SLOTS.get(trial.state, 1), 0.15 + 0.85 * (1 - i / len(trials)) ** 2)
        for i, trial in enumerate(trials)
    ]
    return parallel("Parallel coordinates", axes, lines[::-1], "the better a trial, the darker its line")


def scaling_chart(sweep: SweepConfig, trials: Sequence[TrialResult], fit: ScalingFit) -> str:
    """Measured points and the fitted curve over a logarithmic x."""
    xs = [t.x or 1.0 for t in trials]
    curve = [float(x) for x in np.geomspace(min(xs), max(xs), 61)]
    line = Series("fitted curve", tuple(curve), tuple(fit.at(x) for x in curve), slot=2)
    name = sweep.scaling or ""
    chart = draw(f"Scaling with {name}", [line, *_dots(trials, xs)], note=sweep.metric, x_label=name, log_x=True)
    return chart.html(tall=True) if chart else ""


_SLOTS = {"complete": 0, "pruned": 4}  # colours; other states have 1


def _label(trial: TrialResult) -> str:
    return f"trial {trial.number}, {trial.state}: {trial.value:.4f}"


def _dots(trials: Sequence[TrialResult], xs: Sequence[float] | None = None) -> list[Series]:
    """The trials as points by state, over their numbers or over xs."""
    found: dict[str, list[tuple[float, TrialResult]]] = {}
    for trial, x in zip(trials, xs or [float(t.number) for t in trials], strict=True):
        found.setdefault(trial.state, []).append((x, trial))
    return [
        Series(
            state,
            tuple(x for x, _ in rows),
            tuple(t.value or 0.0 for _, t in rows),
            _SLOTS.get(state, 1),
            "dots",
            tuple(_label(t) for _, t in rows),
        )
        for state, rows in found.items()
    ]
