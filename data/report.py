"""The funnel of a build in the terminal: what each stage kept, changed and dropped, and why.

print_funnel(report)        # as returned by build_dataset or read from report.json
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_funnel(report: dict[str, Any], console: Console | None = None) -> None:
    """One row per stage, then the split sizes and the certificate."""
    console = console or Console()
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
    for split, part in report.get("splits", {}).items():
        share = part["loss_tokens"] / max(part["tokens"], 1)
        sizes = f"{part['dialogues']:,} dialogues, {part['tokens']:,} tokens"
        console.print(f"{split}: {sizes}, {share:.1%} of them with loss, {part['shards']} shard(s)")
    proof = report.get("certificate")
    if proof:
        shared = ", ".join(f"{proof['shared'][name]} {name.replace('_', ' ')}" for name in proof["asked"])
        console.print(f"split certificate: {'valid' if proof['valid'] else 'LEAKS'} (shared by train and validation: {shared})")
