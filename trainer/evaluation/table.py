"""An evaluation's figures as tables on the terminal.

show(summary)        summary: what evaluation.json holds
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from chatmill.formatting import counted

from .figures import CATALOGUE, Named, part_of

WIDTH = 112
MARKS = {"better": "[green]better[/]", "worse": "[red]worse[/]", "different": "different", "": "[dim]–[/]"}


def show(summary: dict[str, Any]) -> None:
    """Print figures with intervals, then by role and by reply, then the comparison if there is one."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # columns of three letters would be unreadable
    table = _table(f"{summary['checkpoint']} on {summary['data']}, {summary['split']}", "", "value", "95 % interval", "n")
    for name, found in summary["metrics"].items():
        kind = CATALOGUE.get(name, Named(name))
        table.add_row(kind.title, figure(found["value"], kind.share), between(found, kind.share), count_of(name, summary))
    console.print(table)
    for key, title in (("per_role", "By role"), ("per_reply", "By position of the reply in its dialogue")):
        if rows := summary.get(key):
            console.print(_by(title, rows))
    counts = ", ".join(f"{part}: {n} dialogues" for part, n in summary["dialogues"].items())
    console.print(f"[dim]{counts}; {summary['loss_tokens']:,} supervised tokens, {summary['bytes']:,} bytes[/]")
    if reduced := summary.get("reduced"):
        console.print(f"[bold]{reduced_words(reduced)}[/]")
    if summary["dialogues_cut"]:
        told = f"{summary['dialogues_cut']} dialogues were cut at {summary['settings']['sequence_length']:,} tokens"
        console.print(f"[dim]{told}: {summary['tokens_left_out']:,} tokens left out[/]")
    for name, signature in summary["signatures"].items():
        console.print(f"[dim]{name}: {signature}[/]")
    if "against" in summary:
        console.print(_comparison(summary["against"]))
    print(f"perplexity      {summary['perplexity']:,.4f}")


def count_of(name: str, summary: dict[str, Any]) -> str:
    """The number of dialogues that a figure comes from."""
    count = summary["dialogues"].get(part_of(name))
    return "" if count is None else f"{count:,}"


def reduced_words(reduced: dict[str, Any]) -> str:
    """What was measured less of on a CPU, and how to get all."""
    told = []
    if "dialogues" in reduced:
        told.append(f"a random {reduced['dialogues']['measured']:,} of {reduced['dialogues']['of']:,} dialogues")
    if "replies" in reduced:
        told.append(f"{reduced['replies']} generated replies")
    if "choices" in reduced:
        told.append(f"{counted(reduced['choices'], 'choice')} among {reduced['candidates']}")
    return f"For two minutes of a CPU: {', '.join(told)}. Everything: --all; or --max-dialogues, --generate, --select N."


def figure(value: float | None, share: bool = False) -> str:
    """A figure for people."""
    if value is None:
        return "–"
    if share:
        return f"{100 * value:.2f} %"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"


def between(found: dict[str, float | None], share: bool = False) -> str:
    """The ends of an interval."""
    if found["low"] is None or found["high"] is None:
        return ""
    return f"{figure(found['low'], share)} … {figure(found['high'], share)}"


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _by(title: str, rows: dict[str, Any]) -> Table:
    table = _table(title, "", "tokens", "loss", "95 % interval", "perplexity", "accuracy", "top 5")
    for name, row in rows.items():
        shares = [figure(row[key]["value"], True) for key in ("accuracy", "top5_accuracy")]
        loss = row["loss"]
        table.add_row(
            name, f"{row['tokens']:,}", figure(loss["value"]), between(loss), figure(row["perplexity"]["value"]), *shares
        )
    return table


def _comparison(against: dict[str, Any]) -> Table:
    title = f"Against {against['checkpoint']}: paired; better or worse where p < 0.05"
    table = _table(title, "", "there", "here", "difference", "95 % interval", "p", "")
    for name, row in against["metrics"].items():
        kind = CATALOGUE.get(name, Named(name))
        table.add_row(
            kind.title,
            figure(row["before"], kind.share),
            figure(row["after"], kind.share),
            figure(row["difference"], kind.share),
            between(row, kind.share),
            f"{row['p']:.3f}",
            MARKS[row["better"]],
        )
    return table
