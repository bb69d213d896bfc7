"""What stands at the head of a run's report: its figures with n and interval, its state, and one paragraph about it.

figures(run)    status_of(run)    lead(run)
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatmill.formatting import counted, duration, number
from chatmill.run_files import list_checkpoints

from .reading import RunRecord, real

Z95 = 1.96
COUNTED = (("dialogues", "dialogue"), ("pairs", "pair"), ("loss_tokens", "supervised token"))


def ends(run: RunRecord, key: str) -> tuple[float, float] | None:
    """A figure of the first and of the last validation."""
    values = [v for v in (real(e.get(key)) for e in run.evals.values()) if math.isfinite(v)]
    return (values[0], values[-1]) if values else None


def last(run: RunRecord, key: str) -> float:
    """The newest value of a column of the steps."""
    return next((v for v in (real(r.get(key)) for r in reversed(run.train.values())) if math.isfinite(v)), math.nan)


def total_tokens(run: RunRecord) -> float:
    """Training tokens so far."""
    total = last(run, "total_tokens")
    if math.isfinite(total):
        return total
    values = [v for v in (real(r.get("tokens")) for r in run.train.values()) if math.isfinite(v)]
    return sum(values) if values else math.nan


def seconds(run: RunRecord) -> float:
    """Time of all attempts, from each start to its last record; the pauses between them are left out. NaN if unknown."""
    spans = run.attempts()
    return sum(ended - began for began, ended in spans) if spans else math.nan


def pauses(run: RunRecord) -> str:
    """What the time leaves out: "3 attempts, 2 h 5 min between them left out"."""
    spans = run.attempts()
    between = sum(max(0.0, following[0] - span[1]) for span, following in itertools.pairwise(spans))
    return f"{len(spans)} attempts, {duration(between)} between them left out" if len(spans) > 1 else ""


def rate(run: RunRecord) -> float:
    """Tokens per second, the median over the logged steps."""
    rates = [v for v in (real(r.get("tokens_per_s")) for r in run.train.values()) if math.isfinite(v)]
    return statistics.median(rates) if rates else math.nan


def change(before: float, after: float, lower_is_better: bool) -> tuple[str, str]:
    """("35% lower", "good")."""
    if after == before:
        return "unchanged", "flat"
    share = abs(after - before) / abs(before) if before else math.nan
    text = f"{share:.0%} " if share >= 0.1 else f"{share:.1%} " if math.isfinite(share) else ""
    return text + ("lower" if after < before else "higher"), "good" if (after < before) == lower_is_better else "bad"


@dataclass(frozen=True, slots=True)
class Figure:
    """A headline figure. change: (text, good | bad | flat) beside it."""

    label: str
    value: str
    note: str = ""
    before: str = ""
    change: tuple[str, str] | None = None
    hero: bool = False


def figures(run: RunRecord) -> list[Figure]:
    """The headline figures that are known."""
    out = []
    several = len(run.evals) > 1
    measured = [e for e in run.evals.values() if math.isfinite(real(e.get("loss")))]
    about = measured_on(measured[-1]) if measured else ""
    if pair := ends(run, "perplexity"):
        before, after = (number(v, 4) for v in pair)
        told = change(*pair, lower_is_better=True) if several else None
        note = " · ".join(filter(None, [between(measured[-1], "perplexity"), about]))
        out.append(Figure("Validation perplexity", after, note, before if several else "", told, hero=True))
    if pair := ends(run, "accuracy"):
        before, after = (f"{v:.1%}" for v in pair)
        told = (f"{100 * (pair[1] - pair[0]):+.1f} points", change(*pair, lower_is_better=False)[1]) if several else None
        note = " · ".join(filter(None, [between(measured[-1], "accuracy"), about]))
        out.append(Figure("Validation token accuracy", after, note, before if several else "", told, hero=True))
    plain = (
        Figure("Training loss", number(last(run, "loss"), 4), "at the last step"),
        Figure("Steps", f"{max(run.train):,}" if run.train else "–", f"of {planned(run):,} planned" if planned(run) else ""),
        Figure("Training tokens", number(total_tokens(run)), "padding not counted"),
        Figure("Time", duration(seconds(run)), pauses(run) or "start to last record"),
        Figure("Throughput", number(rate(run)), "tokens per second, median"),
    )
    return out + [figure for figure in plain if figure.value != "–"]


def between(measured: Mapping[str, Any], name: str) -> str:
    """The 95 % interval of a validation's figure, from the standard errors beside it; "" where there are none."""
    of = "loss" if name == "perplexity" else name
    value, error = real(measured.get(of)), real(measured.get(f"{of}_se"))
    if not math.isfinite(value) or not math.isfinite(error):
        return ""
    low, high = value - Z95 * error, value + Z95 * error
    if name == "perplexity":
        return f"95 % interval {number(math.exp(low), 4)} to {number(math.exp(min(high, 700)), 4)}"
    return f"95 % interval {max(0.0, low):.1%} to {min(1.0, high):.1%}"


def measured_on(measured: Mapping[str, Any]) -> str:
    """The n of a validation: "16 dialogues, 3,456 tokens"."""
    parts = ((real(measured.get(key)), noun) for key, noun in COUNTED)
    return ", ".join(counted(int(count), noun) for count, noun in parts if math.isfinite(count))


def section(run: RunRecord, name: str) -> dict[str, Any]:
    """A section of the recipe, empty where it is missing."""
    section = run.config.get(name)
    return section if isinstance(section, dict) else {}


def planned(run: RunRecord) -> int:
    """Steps that the recipe asks for; 0 where it does not say."""
    steps = real(section(run, "train").get("steps"))
    return int(steps) if math.isfinite(steps) else 0


def status_of(run: RunRecord) -> dict[str, str]:
    """{"kind", "text"}: how far the run is, by its metrics."""
    done, steps = max(run.train, default=0), planned(run)
    if not run.train:
        return {"kind": "flat", "text": "No step logged"}
    if steps and done >= steps:
        return {"kind": "good", "text": "Finished"}
    return {"kind": "warn", "text": f"At step {done:,} of {steps:,}" if steps else f"At step {done:,}"}


def lead(run: RunRecord) -> str:
    """One paragraph for a reader who stops after it."""
    parts = []
    model = section(run, "model")
    if model:
        parts.append(model_words(model, run.path))
    if run.train:
        told = f"{max(run.train):,} steps"
        took = seconds(run)
        told += f" in {duration(took)}" if math.isfinite(took) and took > 0 else ""
        data = section(run, "data").get("path")
        parts.append(f"trained for {told}" + (f" on {data}" if data else ""))
    text = ", ".join(parts)
    text = (text[:1].upper() + text[1:] + ".") if text else "This run left no configuration and no metrics."
    pair = ends(run, "perplexity")
    if pair and len(run.evals) > 1:
        moved, _ = change(*pair, lower_is_better=True)
        told = (
            "did not change"
            if moved == "unchanged"
            else f"ended {moved}: {number(pair[0], 4)} before, {number(pair[1], 4)} after"
        )
        text += f" Validation perplexity {told}."
    return text


def model_words(model: dict[str, Any], run_dir: Path) -> str:
    """ "a Llama-type model of 135 M parameters, started from runs/smollm2".

    The shape is that of the newest checkpoint: a recipe that starts from a checkpoint need not say it.
    """
    from pydantic import ValidationError

    from ..config import ModelConfig

    saved = list_checkpoints(run_dir)
    said: dict[str, Any] = model if not model.get("checkpoint") else {"vocab_size": None}  # not known
    try:
        if saved:
            said = json.loads((saved[-1] / "config.json").read_text(encoding="utf-8"))
        shape = ModelConfig(**{k: v for k, v in said.items() if k in ModelConfig.model_fields})
        size = number(shape.parameter_counts()["total"]).replace(" ", " ")
        words = f"a {shape.family.capitalize()}-type model of {size} parameters"
    except (ValidationError, TypeError, OSError, ValueError, AttributeError):
        words = "a model"
    return words + (f", started from {model['checkpoint']}" if model.get("checkpoint") else "")
