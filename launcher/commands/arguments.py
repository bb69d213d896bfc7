"""What all commands share: how to add one, and arguments that several take.

    command = add_command(commands, "train", _train, "train a model in this process")
    add_recipe(command)

Imports nothing but argparse: --help must answer at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .examples import with_examples

CHECKPOINT_HELP = "a checkpoint folder, or a run folder (its newest whole checkpoint is taken)"
RUN_HELP = "run folder, for example runs/demo"


class Parser(argparse.ArgumentParser):
    """Accepts section.field=value words anywhere; plain argparse refuses them after an option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if hasattr(found, "overrides"):
            words = [word for word in rest if "=" in word and not word.startswith("-")]
            found.overrides = [*found.overrides, *words]
            rest = [word for word in rest if word not in words]
        return found, rest


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, group: str = ""
) -> argparse.ArgumentParser:
    """Add one command with its examples. `run` gets the parsed options and returns the exit code."""
    examples = with_examples(f"{group} {name}".strip())
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, **examples)
    command.set_defaults(run=run)
    return command


def add_group(commands: Any, name: str, summary: str, description: str) -> Any:
    """Add a command with subcommands; returns where to add them."""
    group = commands.add_parser(name, help=summary, description=description)
    return group.add_subparsers(title="commands", metavar="COMMAND", required=True)


def add_recipe(command: argparse.ArgumentParser, example: str = "optimizer.lr=3e-4") -> None:
    """RECIPE and its overrides."""
    command.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="section.field=value", help=f"overrides such as {example}")


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """CHECKPOINT, which may be a run."""
    command.add_argument("checkpoint", help=CHECKPOINT_HELP)


def add_run(command: argparse.ArgumentParser, help: str | None = None) -> None:
    """RUN, a run folder."""
    command.add_argument("run_dir", metavar="RUN", help=help)
