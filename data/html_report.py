"""One self-contained HTML page per data set: funnel with reasons, lengths, loss share, samples with their mask in colour.

    html_report(report, datasets, tokenizer) -> str          # report as in report.json

No script, no outside file; every text of the data is escaped. The same data set always gives the same page.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.data.shards import TokenDataset
from chatmill.data.tokenizer import ChatTokenizer

SAMPLES, SAMPLE_TOKENS = 6, 600
_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2024; --soft: #60646c; --line: #d9dce3; --back: #fff; --learn: #d3f4dd; --learn-ink: #14532d; --bar: #3b82c4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8eaed; --soft: #9aa0aa; --line: #363a42; --back: #16181c; --learn: #1d4a2c; --learn-ink: #c8f5d5; --bar: #6cb1f0;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600; color: var(--soft) } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.soft { color: var(--soft) } details { margin: .2rem 0 } summary { cursor: pointer }
.tokens {
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; color: var(--soft);
  border: 1px solid var(--line); border-radius: 6px; padding: .7rem;
}
.tokens b { font-weight: 400; background: var(--learn); color: var(--learn-ink); border-radius: 2px }
svg { width: 100%; height: auto } rect { fill: var(--bar) } svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
"""


def html_report(report: Mapping[str, Any], datasets: Mapping[str, TokenDataset], tokenizer: ChatTokenizer) -> str:
    """The page. datasets by split."""
    parts = [
        f"<h1>Data set {escape(str(report['name']))}</h1>",
        _splits(datasets),
        _certificate(report.get("certificate")),
        "<h2>What each stage kept, and why it dropped the rest</h2>",
        _funnel(report["stages"]),
    ]
    for split, dataset in datasets.items():
        parts += [f"<h2>Tokens per dialogue, {escape(split)}</h2>", histogram(dataset.lengths)]
    parts.append('<h2>Samples</h2><p class="soft">Coloured tokens carry loss: they are what the model learns to say.</p>')
    first = datasets.get("train") or next(iter(datasets.values()))
    for k in range(min(SAMPLES, len(first))):
        parts.append(sample(first, tokenizer, first.readable(k * len(first) // SAMPLES)))
    body = "\n".join(parts)
    title = f"Data set {escape(str(report['name']))}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{_STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _splits(datasets: Mapping[str, TokenDataset]) -> str:
    rows = [_row(["", "dialogues", "tokens", "with loss", "share", "median", "95 %", "longest"], "th")]
    for split, dataset in datasets.items():
        lengths = dataset.lengths.astype(np.int64)
        tokens, loss = int(lengths.sum()), int(dataset.loss_tokens.sum(dtype=np.int64))
        marks = [f"{int(np.percentile(lengths, q)):,}" for q in (50, 95, 100)]
        rows.append(_row([split, f"{len(lengths):,}", f"{tokens:,}", f"{loss:,}", f"{loss / tokens:.1%}", *marks], "td"))
    return f"<table>{''.join(rows)}</table>"


def _row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}{'' if k == 0 else ' class=n'}>{escape(c)}</{tag}>" for k, c in enumerate(cells)) + "</tr>"


def _certificate(proof: Mapping[str, Any] | None) -> str:
    if not proof:
        return ""
    shared = ", ".join(f"{proof['shared'][name]} {name.replace('_', ' ')}" for name in proof["asked"])
    word = "valid" if proof["valid"] else "LEAKS"
    return f"<p>Split certificate: <strong>{word}</strong>. Train and validation share {escape(shared)}.</p>"


def _funnel(stages: list[Mapping[str, Any]]) -> str:
    heads = '<th>stage</th><th class="n">kept</th><th>unit</th><th class="n">dropped</th><th>reasons and changes, examples</th>'
    rows = [f"<tr>{heads}</tr>"]
    for stage in stages:
        reasons = []
        for sign, found in (("dropped", stage["dropped"]), ("changed", stage["changed"])):
            for reason, count in found.items():
                line = f"{sign} {count:,}: {escape(reason)}"
                cases = "".join(f'<div class="soft">{escape(case)}</div>' for case in stage["examples"].get(reason, ()))
                reasons.append(f"<details><summary>{line}</summary>{cases}</details>" if cases else f"<div>{line}</div>")
        dropped = sum(stage["dropped"].values())
        cells = f'<td>{escape(stage["name"])}</td><td class="n">{stage["kept"]:,}</td><td>{escape(stage["unit"])}</td>'
        rows.append(f'<tr>{cells}<td class="n">{dropped:,}</td><td>{"".join(reasons)}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def histogram(lengths: NDArray[np.uint32]) -> str:
    """Bars over powers of two of the length, as SVG."""
    top = max(4, int(np.ceil(np.log2(int(lengths.max()) + 1))))
    low = min(int(np.floor(np.log2(max(1, int(lengths.min()))))), top - 1)
    edges = 2 ** np.arange(low, top + 1)
    counts = np.histogram(lengths, bins=edges)[0].tolist()
    counts[-1] += len(lengths) - sum(counts)
    width, height, gap = 720 / len(counts), 120, 6
    bars = []
    for k, count in enumerate(counts):
        tall = height * count / max(max(counts), 1)
        x = k * width
        bars.append(f'<rect x="{x + gap / 2:.1f}" y="{140 - tall:.1f}" width="{width - gap:.1f}" height="{tall:.1f}" rx="2"/>')
        bars.append(f'<text x="{x + width / 2:.1f}" y="{134 - tall:.1f}" text-anchor="middle">{count:,}</text>')
        bars.append(f'<text x="{x + width / 2:.1f}" y="156" text-anchor="middle">{int(edges[k]):,}+</text>')
    return f'<svg viewBox="0 0 720 164" role="img" aria-label="histogram of tokens per dialogue">{"".join(bars)}</svg>'


def sample(dataset: TokenDataset, tokenizer: ChatTokenizer, number: int) -> str:
    """One dialogue, runs of tokens with loss in <b>."""
    b = int(np.searchsorted(dataset.block_starts, number, side="right")) - 1
    block = dataset.read_block(b)
    j = number - int(dataset.block_starts[b])
    start, end = int(block.offsets[j]), int(block.offsets[j + 1])
    stop = min(end, start + SAMPLE_TOKENS)
    ids, mask = block.ids[start:stop], block.loss_mask[start:stop]
    borders = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    runs = []
    for k in range(len(borders) - 1):
        text = escape(tokenizer.decode(ids[borders[k] : borders[k + 1]].tolist()))
        runs.append(f"<b>{text}</b>" if mask[borders[k]] else text)
    more = f" … {end - stop:,} more tokens" if stop < end else ""
    source, origin = block.sources[j]
    title = f"dialogue {number:,} from {source}, {origin}: {end - start:,} tokens"
    return f'<p class="soft">{escape(title)}</p><div class="tokens">{"".join(runs)}{more}</div>'
