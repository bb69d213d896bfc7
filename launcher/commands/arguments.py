"""What all commands share: how to add one, and arguments that several take.

    command = add_command(commands, "train", _train, "train a model in this process")
    add_recipe(command)

Imports the standard library only: --help and a wrong name must be answered at once.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatmill.recipe_names import recipe_file

from .examples import with_examples

CHECKPOINT_HELP = "a checkpoint folder, or a run folder (its newest whole checkpoint is taken)"
RECIPES = {part: Path(__file__).resolve().parents[2] / part / "recipes" for part in ("data", "trainer")}
RUN_HELP = "run folder, for example runs/demo"


class Parser(argparse.ArgumentParser):
    """Accepts section.field=value words after options, too, which argparse refuses; names what is nearest to a typo."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = list(action.choices or ())
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(map(str, choices))}"
            raise argparse.ArgumentError(action, f"{str(value)!r} is not known; {hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        for word in rest if self._subparsers is None else ():
            if word.startswith("--") and word != "--":
                known = list(self._option_string_actions)
                near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.6)
                self.error(f"{word}: no such option" + (f"; did you mean {near[0]}?" if near else ""))
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


def add_recipe(command: argparse.ArgumentParser, example: str = "optimizer.lr=3e-4", part: str = "trainer") -> None:
    """RECIPE and its overrides. part: whose recipes the names are, `data` or `trainer`."""
    command.set_defaults(recipes=RECIPES[part])
    command.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="section.field=value", help=f"overrides such as {example}")


def check_recipe(options: argparse.Namespace) -> None:
    """Raise UnknownRecipeError for a recipe that is not there, before anything is imported that takes time."""
    if getattr(options, "recipes", None) is not None:
        recipe_file(options.recipe, options.recipes)


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """CHECKPOINT, which may be a run."""
    command.add_argument("checkpoint", help=CHECKPOINT_HELP)


def add_quiet(command: argparse.ArgumentParser) -> None:
    """--quiet, of commands that show how far long work is."""
    command.add_argument("-q", "--quiet", action="store_true", help="do not show how far the work is (on stderr)")


def add_run(command: argparse.ArgumentParser, help: str | None = None) -> None:
    """RUN, a run folder."""
    command.add_argument("run_dir", metavar="RUN", help=help)
