"""Look at a data set: counts, lengths, loss share, packing fill, and dialogues with their loss mask in colour.

    inspect_dataset("corpora/chitchat")

Green tokens carry loss: they are what the model learns to say. Grey ones are read only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chatmill.files import replace_text

from ..packing.pack import pack_best_fit
from ..remote.blocks import RemoteDataset
from ..remote.files import is_url, local_copy
from ..report.funnel import print_own_system, print_samples, print_texts
from ..report.page import html_report
from ..report.pieces import dialogue_tokens, token_pieces
from ..shards.dataset import TokenDataset
from ..shards.manifest import MANIFEST, read_manifest
from ..tokenizer.tokenizer import ChatTokenizer
from .verify import open_splits

MARKS = ("⟦", "⟧")  # before and after tokens with loss
PACK_LENGTHS = (512, 1024, 2048, 4096, 8192)


def dataset_facts(dataset: TokenDataset) -> dict[str, Any]:
    """Counts and shares of one split; fill: share of a pack's tokens that are not padding, by sequence length."""
    lengths = dataset.lengths.astype(np.int64)
    tokens, loss = int(lengths.sum()), int(dataset.loss_tokens.sum(dtype=np.int64))
    fill = {}
    for capacity in PACK_LENGTHS:
        cut = np.sort(np.minimum(lengths, capacity))[::-1]
        fill[capacity] = float(cut.sum() / (pack_best_fit(cut, capacity)[1] * capacity))
    marks = {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95)}
    return {
        "dialogues": len(lengths),
        "tokens": tokens,
        "loss_tokens": loss,
        "loss_share": loss / tokens,
        "blocks": dataset.n_blocks,
        "lengths": {"min": int(lengths.min()), **marks, "max": int(lengths.max()), "mean": tokens / len(lengths)},
        "fill": fill,
    }


def mask_preview(
    dataset: TokenDataset, tokenizer: ChatTokenizer, number: int, limit: int = 400, *, plain: bool = False
) -> Text:
    """The first `limit` tokens of a dialogue: green with loss, grey without; neighbours in two shades tell tokens apart.

    plain: runs with loss stand between marks, for places without colour.
    """
    ids, mask, _ = dialogue_tokens(dataset, number)
    text, marked = Text(), False
    for k, piece in enumerate(token_pieces(tokenizer, ids[:limit].tolist(), mask[:limit].tolist())):
        if plain and piece.has_loss != marked:
            text.append(MARKS[marked])
            marked = piece.has_loss
        shades = ("black on green", "black on bright_green") if piece.has_loss else ("default on grey23", "default on grey35")
        text.append(piece.text.replace("\n", "↵\n"), style=shades[k % 2])
    if marked:
        text.append(MARKS[True])
    if len(ids) > limit:
        text.append(f" … {len(ids) - limit} more tokens", style="italic")
    return text


def inspect_dataset(
    path: str | Path, samples: int = 2, console: Console | None = None, html: str | Path | None = None
) -> dict[str, Any]:
    """Print counts, lengths and fill of every split and a few dialogues of train; returns the figures by split.

    html: also write the data set's page there, made from the shards (the build writes one as report.html).
    """
    if not is_url(path):
        return _inspect(str(path), Path(path), open_splits(path), samples, console or Console(), html)
    near = ("tokenizer/", "report.json", MANIFEST)
    with local_copy(str(path), lambda name: name.startswith(near)) as folder:
        parts = read_manifest(folder)["splits"]
        splits: dict[str, TokenDataset] = {
            split: RemoteDataset.open(str(path), split, cache=folder / "cache") for split in parts if parts[split]["dialogues"]
        }
        try:
            return _inspect(str(path), folder, splits, samples, console or Console(), html)
        finally:
            for dataset in splits.values():
                dataset.close()


def _inspect(
    path: str, folder: Path, splits: Mapping[str, TokenDataset], samples: int, console: Console, html: str | Path | None
) -> dict[str, Any]:
    """folder: where tokenizer and report lie."""
    facts = {split: dataset_facts(dataset) for split, dataset in splits.items()}
    table = Table(title=f"data set {path}", title_justify="left")
    table.add_column("")
    for split in facts:
        table.add_column(split, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("dialogues", [f"{f['dialogues']:,}" for f in facts.values()]),
        ("tokens", [f"{f['tokens']:,}" for f in facts.values()]),
        ("tokens with loss", [f"{f['loss_tokens']:,} ({f['loss_share']:.1%})" for f in facts.values()]),
        (
            "length: min / median / max",
            [f"{f['lengths']['min']:,} / {f['lengths']['p50']:,} / {f['lengths']['max']:,}" for f in facts.values()],
        ),
        ("length: mean, 95 %", [f"{f['lengths']['mean']:,.0f}, {f['lengths']['p95']:,}" for f in facts.values()]),
        *((f"packing fill at {t:,}", [f"{f['fill'][t]:.1%}" for f in facts.values()]) for t in PACK_LENGTHS),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    console.print(table)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    print_texts(report, console)
    print_samples(report, console)
    tokenizer = ChatTokenizer.load(folder / "tokenizer")
    print_own_system(tokenizer.template.own_system_message() if tokenizer.template_source else None, console)
    dataset = splits.get("train") or next(iter(splits.values()))
    for k in range(min(samples, len(dataset))):
        number = dataset.readable(k * len(dataset) // samples)
        plain = console.color_system is None  # in a file or a pipe
        shown = "between ⟦ and ⟧" if plain else "green"
        console.print(f"\n[bold]dialogue {number}[/bold] {dataset.uid(number)} ({shown}: carries loss)")
        console.print(mask_preview(dataset, tokenizer, number, plain=plain))
    if html is not None:
        replace_text(Path(html), html_report(report, splits, tokenizer))
    return facts
