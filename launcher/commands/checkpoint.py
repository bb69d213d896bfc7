"""`chatmill checkpoint`: list, verify and compare checkpoints."""

from __future__ import annotations

import argparse
from typing import Any

from chatmill.progress import LongWork

from .arguments import CHECKPOINT_HELP, add_command, add_group, add_quiet, add_run


def add_commands(commands: Any) -> None:
    """Add `checkpoint` and its subcommands."""
    group = add_group(commands, "checkpoint", "list, verify and compare checkpoints", "Checkpoints.")
    add_run(add_command(group, "ls", _ls, "a run's checkpoints: step, size, who wrote them, the best", "checkpoint"))
    summary = "read and hash every file; exit 1 and name the file if one is torn or flipped"
    command = add_command(group, "verify", _verify, summary, "checkpoint")
    command.add_argument("path", metavar="PATH", help="a checkpoint folder, or a run folder (all its checkpoints)")
    add_quiet(command)
    summary = "tensors, config and origin of two checkpoints; exit 1 if they differ"
    command = add_command(group, "diff", _diff, summary, "checkpoint")
    command.add_argument("a", metavar="A", help=CHECKPOINT_HELP)
    command.add_argument("b", metavar="B")
    command.add_argument("--limit", type=int, default=20, help="tensors shown, the most different first (default 20)")


def _ls(options: argparse.Namespace) -> int:
    from ...trainer.checkpoint.command import ls

    return ls(options.run_dir)


def _verify(options: argparse.Namespace) -> int:
    from ...trainer.checkpoint.command import verify

    with LongWork(["files"], options.quiet) as show:
        return verify(options.path, show)


def _diff(options: argparse.Namespace) -> int:
    from ...trainer.checkpoint.command import diff

    return diff(options.a, options.b, options.limit)
