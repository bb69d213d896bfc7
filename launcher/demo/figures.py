"""What the demo prints: right answers before and after, and the figures of the training on real chats.

print_score(questions, before, after)       # replies in the order of the questions
print_replies(Path("runs/demo"))
in_words(evaluation)                        # what `chatmill eval --against` wrote, as lines
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chatmill.run_files import read_jsonl

from .persona import Question

LABELS = {"persona": "answers as the persona", "general": "general knowledge"}
SHOWN = 5  # replies below the table


@dataclass(frozen=True, slots=True)
class Row:
    """Right answers of one kind of question in one language."""

    kind: str
    language: str
    n: int
    before: int
    after: int


def score(questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> list[Row]:
    """One row per kind and language, in the order of the questions."""
    right = [(q, q.is_answered_by(old), q.is_answered_by(new)) for q, old, new in zip(questions, before, after, strict=True)]
    kinds = dict.fromkeys(q.kind for q in questions)
    rows = []
    for kind in kinds:
        for language in dict.fromkeys(q.language for q in questions if q.kind == kind):
            found = [(old, new) for q, old, new in right if (q.kind, q.language) == (kind, language)]
            rows.append(Row(kind, language, len(found), sum(old for old, _ in found), sum(new for _, new in found)))
    return rows


def share_interval(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson)."""
    z = 1.96
    middle = (right + z * z / 2) / (n + z * z)
    half = z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    return max(0.0, middle - half), min(1.0, middle + half)


def print_score(
    questions: Sequence[Question], before: Sequence[str], after: Sequence[str], console: Console | None = None
) -> None:
    """The table of right answers to held-out questions, and a few of the replies."""
    console = console or Console()
    table = Table("right answers to held-out questions", "before", "after", "after, 95 % interval")
    for row in score(questions, before, after):
        low, high = share_interval(row.after, row.n)
        table.add_row(
            f"{LABELS[row.kind]} ({row.language})",
            f"{row.before} of {row.n}",
            f"{row.after} of {row.n}",
            f"{low:.0%} to {high:.0%}",
        )
    console.print(table)
    first: dict[tuple[str, str], int] = {}
    for number, question in enumerate(questions):
        first.setdefault((question.language, question.kind), number)
    for number in list(first.values())[:SHOWN]:
        console.print(f"\n> {escape(questions[number].text)}", highlight=False)
        for label, replies in (("before", before), ("after", after)):
            console.print(f"  {label:<7}{escape(' '.join(replies[number].split()))}", highlight=False)


def print_replies(run: Path, console: Console | None = None) -> None:
    """Replies of the training's first and last validation."""
    console = console or Console()
    samples = list(read_jsonl(run / "samples.jsonl"))
    steps = [line["step"] for line in samples]
    console.print("\n== Replies before and after reading real chats")
    for prompt in dict.fromkeys(line["prompt"] for line in samples):
        replies = {line["step"]: line["reply"] for line in samples if line["prompt"] == prompt}
        console.print(f"\n> {escape(prompt)}", highlight=False)
        for label, step in (("before", min(steps)), ("after", max(steps))):
            console.print(f"  {label:<7}{escape(' '.join(replies.get(step, '').split()))}", highlight=False)


def in_words(summary: Mapping[str, Any]) -> list[str]:
    """Loss, accuracy and perplexity of an evaluation with `against`: before -> after, interval and p of the difference."""
    against = summary["against"]
    size = f"n = {against['dialogues']['tokens']} dialogues, {summary['loss_tokens']:,} tokens"
    lines = [f"validation of {summary['checkpoint']} against {against['checkpoint']}, {size}; intervals are 95 %, paired"]
    for name, unit, digits, factor in (("loss", "", 3, 1), ("accuracy", " %", 1, 100), ("perplexity", "", 1, 1)):
        found = against["metrics"][name]

        def show(key: str, sign: str = "", found: Any = found, digits: int = digits, factor: int = factor) -> str:
            return f"{factor * found[key]:{sign}.{digits}f}"

        change = f"difference {show('difference', '+')}, {show('low', '+')} to {show('high', '+')}, p = {found['p']:.3f}"
        lines.append(f"validation {name}: {show('before')}{unit} -> {show('after')}{unit}  ({change})")
    return lines
