"""The figures of an evaluation: their names, how each is computed from summed records, and how two evaluations compare.

    summary = summarise(records, seed=0, resamples=1000, bleu=Bleu())
    summary["metrics"]["loss"]                                              # {"value": 3.2, "low": 3.1, "high": 3.3}

`records` holds the sums that `chatmill.trainer.evaluation.measuring` makes, by part (tokens, replies, selection) and dialogue.
Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .confidence import Figures, Interval, Metric, Sums, difference, interval, make_draws
from .text_scores import Bleu, chrf

CANDIDATES = (10, 100)  # replies to choose among
# replies 1, 2, 3, 4, 5 to 8 ... of a dialogue: the last bucket is open
TURN_BUCKETS = ("1", "2", "3", "4", "5-8", "9-16", "17+")
ROLES = ("assistant", "user", "system", "tool")
Part = Literal["tokens", "replies", "selection"]
PARTS: tuple[Part, ...] = ("tokens", "replies", "selection")
Records = Mapping[str, Mapping[str, Mapping[str, float]]]  # part -> uid -> sums


Better = Literal["lower", "higher", ""]


@dataclass(frozen=True, slots=True)
class Named:
    """How a figure is shown. better: the direction of improvement. share: printed as a percentage."""

    title: str
    better: Better = "higher"
    share: bool = False


CATALOGUE: dict[str, Named] = {
    "loss": Named("loss (nats per token)", "lower"),
    "perplexity": Named("perplexity", "lower"),
    "bits_per_byte": Named("bits per byte", "lower"),
    "accuracy": Named("token accuracy", share=True),
    "top5_accuracy": Named("token accuracy, top 5", share=True),
    "bleu": Named("BLEU"),
    "chrf": Named("chrF"),
    "rouge_l": Named("ROUGE-L", share=True),
    "token_precision": Named("word precision", share=True),
    "token_recall": Named("word recall", share=True),
    "token_f1": Named("word F1", share=True),
    "exact_match": Named("exact match", share=True),
    "stop_rate": Named("ended by itself", "", share=True),
    "reply_tokens": Named("tokens per reply", ""),
    "reference_tokens": Named("tokens per reference", ""),
    "distinct_1": Named("different words", "", share=True),
    "distinct_2": Named("different pairs of words", "", share=True),
} | {
    f"{kind}_of_{size}_{how}": Named(f"{words} of {size}, {told}", share=kind != "mean_reciprocal_rank")
    for how, told in (("mean", "mean ln p"), ("sum", "sum of ln p"))
    for size in CANDIDATES
    for kind, words in (
        ("recall_1", "recall@1"),
        ("recall_5", "recall@5"),
        ("recall_10", "recall@10"),
        ("mean_reciprocal_rank", "reciprocal rank"),
    )
}


@dataclass(frozen=True, slots=True)
class Measure:
    """How one figure of the catalogue is computed from the sums of a part."""

    name: str
    part: Part
    compute: Metric


def part_of(name: str) -> Part:
    """The part of the records that a figure of the catalogue comes from."""
    if name.startswith(("recall_", "mean_reciprocal_rank")):
        return "selection"
    return "tokens" if name in (measure.name for measure in token_measures()) else "replies"


def ratio(above: str, below: str) -> Metric:
    """above / below."""
    return lambda s: s[above] / s[below]


def perplexity(prefix: str = "") -> Metric:
    """exp(nll / tokens)."""
    return lambda s: np.exp(s[f"{prefix}nll"] / s[f"{prefix}tokens"])


def bits_per_byte(s: Figures) -> Any:
    """nll / ln 2 / bytes: comparable between tokenizers."""
    return s["nll"] / (math.log(2) * s["bytes"])


def token_measures(prefix: str = "") -> list[Measure]:
    """Loss, perplexity and accuracies of the tokens whose columns begin with the prefix."""
    tokens = f"{prefix}tokens"
    out = [Measure("loss", "tokens", ratio(f"{prefix}nll", tokens)), Measure("perplexity", "tokens", perplexity(prefix))]
    if not prefix:
        out.append(Measure("bits_per_byte", "tokens", bits_per_byte))
    out.append(Measure("accuracy", "tokens", ratio(f"{prefix}top1", tokens)))
    return [*out, Measure("top5_accuracy", "tokens", ratio(f"{prefix}top5", tokens))]


def measures(records: Records, bleu: Bleu | None) -> list[Measure]:
    """Every figure that these records allow."""
    columns = {p: {name for record in records.get(p, {}).values() for name in record} for p in PARTS}
    out = token_measures() if columns["tokens"] else []
    if columns["replies"]:
        if bleu is not None and "bleu_reply" in columns["replies"]:
            out.append(Measure("bleu", "replies", bleu.score))
        out.append(Measure("chrf", "replies", chrf))
        means = ["rouge_l", "token_precision", "token_recall", "token_f1", "exact_match", "reply_tokens", "reference_tokens"]
        out += [Measure(name, "replies", ratio(name, "replies")) for name in means]
        out.append(Measure("stop_rate", "replies", ratio("stopped", "replies")))
    chosen = [name for name in CATALOGUE if name in columns["selection"]]
    return out + [Measure(name, "selection", ratio(name, "choices")) for name in chosen]


def sums_of(records: Records, part: Part, uids: Sequence[str] | None = None) -> Sums:
    """The rows of a part, in the order given or found."""
    found = records.get(part, {})
    return Sums.of([found[uid] for uid in (found if uids is None else uids)])


def summarise(records: Records, *, seed: int, resamples: int, bleu: Bleu | None) -> dict[str, Any]:
    """All figures with intervals: `metrics`, `per_role`, `per_reply`, and the number of dialogues of each part."""
    draws = {p: make_draws(len(records[p]), resamples, seed) for p in PARTS if records.get(p)}
    sums = {part: sums_of(records, part) for part in draws}

    def figure(measure: Measure) -> dict[str, float | None]:
        return plain(interval(measure.compute, sums[measure.part], draws[measure.part]))

    out: dict[str, Any] = {"metrics": {m.name: figure(m) for m in measures(records, bleu)}}
    if "tokens" in sums:
        total = sums["tokens"].total()
        out["loss_tokens"], out["bytes"] = int(total["tokens"][0]), int(total["bytes"][0])
        for kind, key in (("per_role", ""), ("per_reply", "reply ")):
            order = [f"{key}{name}" for name in (TURN_BUCKETS if key else ROLES)]
            out[kind] = {
                name.removeprefix(key): {"tokens": int(total[f"{name} tokens"][0])}
                | {m.name: figure(m) for m in token_measures(f"{name} ")}
                for name in order
                if f"{name} nll" in total
            }
    out["dialogues"] = {part: len(rows.rows) for part, rows in sums.items()}
    return out


def compare(first: Records, second: Records, *, seed: int, resamples: int, bleu: Bleu | None) -> dict[str, Any]:
    """second minus first for every figure that both have, on the dialogues that both have. Paired draws."""
    out: dict[str, Any] = {"metrics": {}, "dialogues": {}}
    for part in PARTS:
        shared = [uid for uid in second.get(part, {}) if uid in first.get(part, {})]
        if not shared:
            continue
        out["dialogues"][part] = len(shared)
        before, after = sums_of(first, part, shared), sums_of(second, part, shared)
        draws = make_draws(len(shared), resamples, seed)
        common = set(measures_of(first, part, bleu)) & set(measures_of(second, part, bleu))
        for measure in measures(second, bleu):
            if measure.part != part or measure.name not in common or measure.name == "reference_tokens":
                continue
            found = difference(measure.compute, before, after, draws)
            with np.errstate(all="ignore"):
                values = [float(measure.compute(rows.total())[0]) for rows in (before, after)]
            out["metrics"][measure.name] = {
                "before": finite(values[0]),
                "after": finite(values[1]),
                "difference": finite(found.value),
                "low": finite(found.low),
                "high": finite(found.high),
                "p": found.p,
                "better": verdict(found.low, found.high, found.p, CATALOGUE[measure.name].better),
            }
    return out


def measures_of(records: Records, part: Part, bleu: Bleu | None) -> list[str]:
    """Names of a part's figures."""
    return [m.name for m in measures(records, bleu) if m.part == part]


def verdict(low: float, high: float, p: float, better: str) -> str:
    """ "better", "worse" or "different" where p < 0.05 and the interval excludes 0; "" otherwise."""
    if p >= 0.05 or low <= 0 <= high or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if not better:
        return "different"
    return "better" if (low > 0) == (better == "higher") else "worse"


def plain(found: Interval) -> dict[str, float | None]:
    """For JSON."""
    return {"value": finite(found.value), "low": finite(found.low), "high": finite(found.high)}


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None
