"""The evaluation tables of the run report, from `evaluation*.json` as `chatmill eval` wrote them.

    section = evaluation_section("", "evaluation", tree)

Files in another format are shown as plain facts; nothing in them can make the report fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatmill.formatting import number

from ..evaluation.figures import CATALOGUE
from .reading import RunRecord, flatten, real

PILLS = {"better": "good", "worse": "bad", "different": "flat"}


def evaluation_section(run: str, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluation for the template: title, note, rows of figures, groups, comparison, facts."""
    words = name.replace("_", " ").replace("-", " ").replace("evaluation", "full evaluation", 1)
    title = f"{run}: {words}" if run else words.capitalize()
    metrics = tree.get("metrics")
    if not isinstance(metrics, dict):
        return {"title": title, "note": "", "rows": [], "groups": [], "against": None, "facts": flatten(tree)}
    groups = [
        {"title": words, "rows": _group(tree[key])}
        for key, words in (("per_role", "by role"), ("per_reply", "by position of the reply"))
        if isinstance(tree.get(key), dict)
    ]
    kept = {
        k: v
        for k, v in tree.items()
        if k in ("checkpoint", "data", "split", "per_data", "signatures", "settings", "device", "parameters")
    }
    return {
        "title": title,
        "note": _note(tree),
        "rows": [
            {"title": _title(key), "value": _figure(key, m.get("value")), "between": _between(key, m)}
            for key, m in metrics.items()
            if isinstance(m, dict)
        ],
        "groups": groups,
        "against": _against(tree.get("against")),
        "facts": flatten(kept),
    }


def beside_another(name: str, evaluations: Mapping[str, Any]) -> bool:
    """Whether this is the second checkpoint of a comparison, whose figures are in the first one's table."""
    of = evaluations.get(name.removesuffix("-against"))
    return name.endswith("-against") and isinstance(of, dict) and "against" in of


def evaluations_side_by_side(runs: Sequence[tuple[str, RunRecord]]) -> dict[str, Any] | None:
    """The newest full evaluation of each run in one table; None if fewer than two runs have one."""
    newest = []
    for label, run in runs:
        trees = [t for n, t in run.evaluations.items() if isinstance(t.get("metrics"), dict) and not n.endswith("-against")]
        if trees:
            newest.append((label, trees[-1]["metrics"]))
    if len(newest) < 2:
        return None
    names = [name for name in newest[0][1] if all(isinstance(m.get(name), dict) for _, m in newest)]
    rows = [
        {
            "title": _title(name),
            "cells": [{"value": _figure(name, m[name].get("value")), "between": _between(name, m[name])} for _, m in newest],
        }
        for name in names
    ]
    return {"head": [label for label, _ in newest], "rows": rows}


def _note(tree: Mapping[str, Any]) -> str:
    counts = tree.get("dialogues")
    parts = [f"{real(n):,.0f} dialogues for {part}" for part, n in counts.items()] if isinstance(counts, dict) else []
    cut = real(tree.get("dialogues_cut"))
    if cut > 0:
        parts.append(f"{cut:,.0f} of them cut at the longest length")
    return ", ".join([f"{tree.get('data', '')} {tree.get('split', '')}".strip(), *parts])


def _group(rows: Mapping[str, Any]) -> list[dict[str, str]]:
    out = []
    for name, row in rows.items():
        if not isinstance(row, dict):
            continue
        values = {key: row[key].get("value") for key in ("loss", "perplexity", "accuracy") if isinstance(row.get(key), dict)}
        told = {key: _figure(key, values.get(key)) for key in ("loss", "perplexity", "accuracy")}
        out.append({"name": str(name), "tokens": f"{real(row.get('tokens')):,.0f}"} | told)
    return out


def _against(found: Any) -> dict[str, Any] | None:
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict):
        return None
    rows = []
    for name, row in found["metrics"].items():
        if isinstance(row, dict):
            told = {key: _figure(name, row.get(key)) for key in ("before", "after", "difference")}
            verdict = str(row.get("better") or "")
            rows.append(
                {"title": _title(name), "between": _between(name, row), "p": f"{real(row.get('p')):.3f}", "verdict": verdict}
                | {"kind": PILLS.get(verdict, "flat")}
                | told
            )
    return {"name": str(found.get("checkpoint", "")), "rows": rows}


def _title(name: str) -> str:
    return CATALOGUE[name].title if name in CATALOGUE else name.replace("_", " ")


def _figure(name: str, value: Any) -> str:
    at = real(value)
    if name in CATALOGUE and CATALOGUE[name].share and at == at:
        return f"{100 * at:.2f} %"
    return number(at, 4)


def _between(name: str, row: Mapping[str, Any]) -> str:
    low, high = _figure(name, row.get("low")), _figure(name, row.get("high"))
    return "" if low == "–" or high == "–" else f"{low} … {high}"
