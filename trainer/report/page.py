"""One HTML file that shows how a run went: figures, curves, replies, data, configuration, events.

    chatmill report runs/demo [--compare runs/other]      -> runs/demo/report.html

The file is self-contained (no script, style, font or image from elsewhere), reads without JavaScript and prints.
It can be built at any time, even from a run that is still going, crashed, or never began.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from chatmill.files import replace_text
from chatmill.formatting import duration, number

from ...data.report.charts import STYLE
from .curves import curves, label_of
from .evaluation import beside_another, evaluation_section, evaluations_side_by_side
from .headline import ends, figures, last, lead, rate, seconds, status_of, total_tokens
from .reading import RunRecord, flatten, read_run, real

TEMPLATE = Path(__file__).with_name("template.html")
FAULT_WORDS = (
    "nan",
    "fault",
    "error",
    "fail",
    "spike",
    "skip",
    "rollback",
    "preempt",
    "signal",
    "crash",
    "oom",
    "abort",
    "warn",
)


def build_report(run_dir: Path, out: Path | None = None, compare: Sequence[Path] = ()) -> Path:
    """Write the report of run_dir (by default to run_dir/report.html) and return its path."""
    runs = [read_run(Path(run_dir)), *(read_run(Path(p)) for p in compare)]
    target = Path(out) if out is not None else runs[0].path / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, render(runs))
    return target


def render(runs: Sequence[RunRecord], status: Mapping[str, str] | None = None, live: bool = False) -> str:
    """The report of runs[0], compared with the others, as HTML.

    status: {"kind": good | bad | warn | flat, "text"} from who knows more than the folder. live: the page fetches itself again.
    """
    run = runs[0]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        name=run.name,
        made=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        lead=lead(run),
        status=status or status_of(run),
        figures=figures(run),
        chart_style=Markup(STYLE),
        charts=[Markup(chart) for chart in curves(runs)],
        comparison=_comparison(runs) if len(runs) > 1 else None,
        samples=_samples(run.samples),
        eval_table=_eval_table(run),
        evaluations=[
            evaluation_section(label_of(runs, run) if len(runs) > 1 else "", name, tree)
            for run in runs
            for name, tree in run.evaluations.items()
            if not beside_another(name, run.evaluations)
        ],
        evaluations_beside=evaluations_side_by_side([(label_of(runs, r), r) for r in runs]) if len(runs) > 1 else None,
        funnel=_funnel(run),
        data_facts=_data_facts(run),
        config={section: flatten(tree) if isinstance(tree, dict) else {"": str(tree)} for section, tree in run.config.items()},
        environment=flatten(run.environment),
        events=_events(run),
        command=run.command,
        notes=run.notes,
        live=live,
    )


def _comparison(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    rows = []
    for slot, run in enumerate(runs):
        perplexity, accuracy = ends(run, "perplexity"), ends(run, "accuracy")
        rows.append(
            {
                "name": label_of(runs, run),
                "slot": str(slot % 6),
                "steps": f"{max(run.train, default=0):,}",
                "tokens": number(total_tokens(run)),
                "time": duration(seconds(run)),
                "rate": number(rate(run)),
                "loss": number(last(run, "loss"), 4),
                "perplexity": number(perplexity[1], 4) if perplexity else "–",
                "accuracy": f"{accuracy[1]:.1%}" if accuracy else "–",
            }
        )
    return rows


def _words(value: Any) -> str:
    """A prompt or reply as text; a list of messages becomes its turns."""
    if isinstance(value, list):
        return "\n".join(_words(v.get("content", "")) if isinstance(v, dict) else str(v) for v in value)
    return "" if value is None else str(value)


def _samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_prompt: dict[str, dict[int, str]] = {}
    for row in rows:
        step = real(row.get("step"))
        if "prompt" in row and "reply" in row and math.isfinite(step):
            by_prompt.setdefault(_words(row["prompt"]), {})[int(step)] = _words(row["reply"])
    return [{"prompt": prompt, "replies": sorted(replies.items())} for prompt, replies in by_prompt.items()]


def _eval_table(run: RunRecord) -> dict[str, Any] | None:
    keys = list(dict.fromkeys(k for e in run.evals.values() for k, v in e.items() if not math.isnan(real(v))))
    if not keys:
        return None
    rows = [
        [f"{step:,}", *(f"{real(e.get(k)):.2%}" if k == "accuracy" and k in e else _cell(real(e.get(k))) for k in keys)]
        for step, e in run.evals.items()
    ]
    return {"head": ["step", *(k.replace("_", " ") for k in keys)], "rows": rows}


def _cell(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) and abs(value) >= 100 else number(value, 5)


def _funnel(run: RunRecord) -> list[dict[str, Any]]:
    stages = run.data_report.get("stages")
    rows: list[dict[str, Any]] = []
    for stage in stages if isinstance(stages, list) else []:
        if not isinstance(stage, dict):
            continue
        raw = stage.get("dropped")
        dropped = {str(k): real(v) for k, v in raw.items() if real(v) > 0} if isinstance(raw, dict) else {}
        kept = real(stage.get("kept"))
        kept = kept if math.isfinite(kept) else 0.0
        changes = stage.get("changed")
        examples = stage.get("examples")
        rows.append(
            {
                "name": str(stage.get("name", "stage")),
                "unit": str(stage.get("unit", "")),
                "kept": kept,
                "lost": sum(dropped.values()),
                "seconds": real(stage.get("seconds")),
                "reasons": sorted(dropped.items(), key=lambda item: -item[1]),
                "changed": [f"{k.replace('_', ' ')}: {real(v):,.0f}" for k, v in changes.items() if real(v) > 0]
                if isinstance(changes, dict)
                else [],
                "examples": examples if isinstance(examples, dict) else {},
            }
        )
    widest: dict[str, float] = {}
    for row in rows:
        widest[row["unit"]] = max(widest.get(row["unit"], 0.0), row["kept"] + row["lost"])
    for row in rows:
        whole = widest[row["unit"]] or 1.0
        row["kept_share"], row["lost_share"] = 100 * row["kept"] / whole, 100 * row["lost"] / whole
        came = row["kept"] + row["lost"]
        row["kept_text"], row["lost_text"] = f"{row['kept']:,.0f}", f"{row['lost']:,.0f}"
        row["percent"] = f"{row['kept'] / came:.1%} kept" if came else ""
        row["took"] = duration(row.pop("seconds"))
        row["reasons"] = [
            {
                "name": k.replace("_", " "),
                "count": f"{v:,.0f}",
                "examples": [_words(e) if not isinstance(e, dict) else str(e) for e in _some(row["examples"].get(k))],
            }
            for k, v in row["reasons"]
        ]
    return rows


def _some(value: Any) -> list[Any]:
    return value[:3] if isinstance(value, list) else []


def _data_facts(run: RunRecord) -> dict[str, str]:
    """Folder, sizes of the splits, split certificate and tokenizer, as far as known."""
    if run.data_path is None:
        return {}
    facts = {"folder": str(run.data_path)}
    splits = run.data_report.get("splits") or run.data_manifest.get("splits")
    for name, part in splits.items() if isinstance(splits, dict) else ():
        if isinstance(part, dict):
            counts = {k: real(part.get(k)) for k in ("dialogues", "tokens", "loss_tokens")}
            told = [f"{v:,.0f} {k.replace('loss_tokens', 'of them with loss')}" for k, v in counts.items() if math.isfinite(v)]
            facts[name] = ", ".join(told)
    proof = run.data_report.get("certificate")
    if isinstance(proof, dict) and "valid" in proof:
        shared, asked = proof.get("shared"), proof.get("asked")
        both = [f"{shared.get(k, 0)} {str(k).replace('_', ' ')}" for k in asked or ()] if isinstance(shared, dict) else []
        facts["split certificate"] = ("valid" if proof["valid"] else "LEAKS") + (
            f" ({', '.join(both)} in both splits)" if both else ""
        )
    long = next((row["overlong"] for row in reversed(run.train.values()) if isinstance(row.get("overlong"), dict)), None)
    if long is not None:
        fates = ", ".join(f"{real(long.get(k)):,.0f} {k.replace('_', ' ')}" for k in ("truncated", "split", "dropped"))
        which = f"{real(long.get('overlong')):,.0f} of {real(long.get('dialogues')):,.0f} dialogues planned: {fates}"
        facts["longer than a pack"] = f"{which}; {real(long.get('cut_inside_turn')):,.0f} cut inside a turn"
    for key in ("vocab_size", "tokenizer_sha256", "template_sha256", "recipe_sha256"):
        if key in run.data_manifest:
            facts[key.replace("_", " ")] = str(run.data_manifest[key])
    return {key: value for key, value in facts.items() if value}


def _events(run: RunRecord) -> list[dict[str, str]]:
    out = []
    for row in run.events:
        rest = dict(row)
        at = real(rest.pop("time", None))
        kind = next((str(rest.pop(k)) for k in ("event", "kind", "type", "name") if isinstance(rest.get(k), str)), "event")
        step = real(rest.pop("step", None))
        level = str(rest.pop("level", "")).lower()
        fault = level in ("warning", "error", "critical") or any(w in kind.lower() for w in FAULT_WORDS)
        message = str(rest.pop("message", ""))
        details = ", ".join(f"{k} {v}" for k, v in flatten(rest).items())
        out.append(
            {
                "when": datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
                if 1e8 < at < 1e11
                else (duration(at) if math.isfinite(at) else ""),
                "step": f"{step:,.0f}" if math.isfinite(step) else "",
                "kind": kind.replace("_", " "),
                "text": " · ".join(t for t in (message, details) if t),
                "fault": "yes" if fault else "",
            }
        )
    return out
