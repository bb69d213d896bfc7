"""The `chatmill` command.

Each command imports what it needs only when it runs: `--help` touches neither torch nor pydantic.
Exit codes: 0 done; 1 a check found problems; 2 unusable input (the message says what was expected and what to do).
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from chatmill import __version__
from chatmill.recipe_names import UnknownRecipeError
from chatmill.shell import in_this_shell

from .commands import checkpoint, data, guide, jobs, model
from .commands.arguments import Parser, check_recipe
from .commands.examples import with_examples

INPUT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn errors that a user can correct into one message and exit code 2."""
    options = build_parser().parse_args(arguments)
    try:
        check_recipe(options)
    except UnknownRecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        code = int(options.run(options))
        sys.stdout.flush()  # while a full disk can still be reported
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        from chatmill.config import ConfigError
        from chatmill.files import disk_problem

        problem = "" if isinstance(error, ConfigError) else disk_problem(error)
        if isinstance(error, RuntimeError):  # of a library that lost its lock to the same disk
            problem = disk_problem(error.__context__)
        if not problem and not isinstance(error, (ConfigError, *INPUT)):
            raise
        with contextlib.suppress(OSError):  # a log on the same disk
            print(in_this_shell(f"error: {problem or error}"), file=sys.stderr, flush=True)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    summary = "From raw conversations to a chat model that answers."
    parser = Parser(prog="chatmill", description=summary, **with_examples(""))
    parser.add_argument("--version", action="version", version=f"chatmill {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser.set_defaults(parser=parser)
    for part in (guide, data, model, checkpoint, jobs):
        part.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
