"""The funnel of a build in the terminal: what each stage kept, changed and dropped, and why.

print_funnel(report)        # as returned by build_dataset or read from report.json
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chatmill.formatting import counted

from ..ledger import ranked, shorten
from ..samples.repeats import in_words as repeats_in_words
from ..samples.split import in_words
from .bins import binned_turns
from .text_counts import TextCounts

FILES_NAMED = 5
_NAMES = {"documents": "documents (plain texts: every token carries loss)"}


def print_funnel(report: dict[str, Any], console: Console | None = None) -> None:
    """One row per stage, then the split sizes and the certificate."""
    console = console or Console()
    if report["stages"]:
        _print_stages(report, console)
    print_files(report.get("files") or {}, console)
    for split, part in report.get("splits", {}).items():
        share = part["loss_tokens"] / max(part["tokens"], 1)
        sizes = f"{part['dialogues']:,} dialogues, {part['tokens']:,} tokens"
        console.print(f"{split}: {sizes}, {share:.1%} of them with loss, {part['shards']} shard{'s' * (part['shards'] != 1)}")
    print_texts(report, console)
    proof = report.get("certificate")
    if proof:
        console.print(
            f"split certificate: {'valid' if proof['valid'] else 'LEAKS'} (shared by train and validation: {in_words(proof)})"
        )
    if told := repeats_in_words(report.get("repeats")):
        console.print(f"validation {told}", style="yellow")


def print_collected(report: dict[str, Any], console: Console | None = None) -> None:
    """What `data collect` added to a set that was there, and which of its files have gone."""
    console = console or Console()
    if (added := report.get("added")) is not None:
        came = added["train"] + added["validation"] - added["replaced"]
        line = f"new: {counted(len(added['files']), 'file')}; {counted(came, 'dialogue')} more"
        if added["replaced"]:
            line += f", {counted(added['replaced'], 'dialogue')} replaced by a longer export"
        console.print(f"{line}; {counted(report['known'], 'file')} read before", highlight=False)
    elif "known" in report:
        console.print(f"nothing new: {counted(report['known'], 'file')} read before", highlight=False)
    if gone := report.get("gone"):
        named = ", ".join(gone[:FILES_NAMED]) + (", …" if len(gone) > FILES_NAMED else "")
        line = f"no longer in the sources: {counted(len(gone), 'file')} ({named}). What they held stays in the set. "
        line += "To take it out, build the set again: chatmill data build RECIPE"
        console.print(escape(line), style="yellow", highlight=False)
    console.print(report["out"], highlight=False, soft_wrap=True)


def _print_stages(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"data {report['name']}", title_justify="left")
    for name, justify in (
        ("stage", "left"),
        ("kept", "right"),
        ("unit", "left"),
        ("dropped", "right"),
        ("why, and what was changed", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    timed = any(stage.get("seconds") for stage in report["stages"])
    if timed:
        table.add_column("s", justify="right")
    for stage in report["stages"]:
        reasons = [f"-{count:,} {reason}" for reason, count in stage["dropped"].items()]
        reasons += [f"~{count:,} {reason}" for reason, count in stage["changed"].items()]
        row = [
            stage["name"],
            f"{stage['kept']:,}",
            stage["unit"],
            f"{sum(stage['dropped'].values()):,}",
            escape("\n".join(reasons)),
        ]
        table.add_row(*row, *([f"{stage.get('seconds', 0):.1f}"] if timed else []))
    console.print(table)


def print_files(files: dict[str, Any], console: Console) -> None:
    """How many raw files were read as what, and which were not."""
    if formats := files.get("formats"):
        console.print(f"files: {', '.join(f'{n:,} {_NAMES.get(name, name)}' for name, n in formats.items())}", highlight=False)
    for assistant in files.get("assistants") or ():
        console.print(f"assistant: {escape(assistant)}; `assistant:` of the source names another", highlight=False)
    print_own_system(files.get("own_system"), console)
    if left_out := files.get("left_out"):
        named = ", ".join(left_out[:FILES_NAMED]) + (", …" if len(left_out) > FILES_NAMED else "")
        line = f"left out, empty or of no known format: {len(left_out):,} files: {escape(named)}"
        console.print(line, style="yellow", highlight=False)


def print_own_system(message: str | None, console: Console) -> None:
    """What the chat template says in the name of the system where a dialogue has no such message."""
    if message:
        shown = escape(shorten(message))
        console.print(f"system message of the chat template, put before dialogues without one: {shown}", highlight=False)
        console.print("  `pair.system` of the data recipe puts another one there", highlight=False)


def print_texts(report: dict[str, Any], console: Console) -> None:
    """Turns, languages, duplicates and private data, a line each."""
    texts = TextCounts.total((report.get("texts") or {}).values())
    if texts.turns:
        shares = _shares({f"{label} turns": n for label, n in binned_turns(texts.turns)})
        console.print(f"turns: mean {texts.mean_turns:.1f}; {shares}", highlight=False)
    if texts.languages:
        console.print(f"languages: {_shares(texts.languages)}", highlight=False)
    for stage, what, prefix in (("dedup", "duplicates", ""), ("clean", "private data", "private: ")):
        facts: dict[str, Any] = next((s for s in report["stages"] if s["name"] == stage), {})
        found = facts.get("changed" if prefix else "dropped", {})
        named = [f"{n:,} {reason.removeprefix(prefix)}" for reason, n in found.items() if reason.startswith(prefix)]
        if named:
            console.print(f"{what}: {', '.join(named)}", highlight=False)


def print_samples(report: Mapping[str, Any], console: Console) -> None:
    """How many dialogues the chat template asks to be cut, and what it does not print."""
    for stage in report["stages"]:
        for what, n in (stage.get("changed") or {}).items():
            if "chat template" in what or "pair.thinking" in what:
                console.print(f"{stage['name']}: {n:,} x {escape(what)}", highlight=False)


def _shares(counts: Mapping[str, int], most: int = 6) -> str:
    total = sum(counts.values()) or 1
    shown = [f"{name} {n / total:.0%}" for name, n in ranked(counts).items()]
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")
