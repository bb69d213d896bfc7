"""new, help, recipes, schema and completion on the `chatmill` command line: what shows the way."""

from __future__ import annotations

import argparse
from typing import Any

from chatmill.shell import in_this_shell

from .arguments import add_command

GROUPS = {
    "to begin": ("new", "recipes", "help"),
    "data": ("data",),
    "a model": ("train", "eval", "chat", "generate", "serve"),
    "models from and for elsewhere": ("import", "export", "merge", "checkpoint"),
    "runs": ("watch", "report", "status", "logs", "cancel", "resume"),
    "machines": ("launch", "plan", "sweep", "doctor", "bench"),
    "editors and shells": ("schema", "completion"),
}


def add_commands(commands: Any) -> None:
    """Add the commands that show the way."""
    summary = "from your own chats to a bot: looks at them, asks whom the model is to become, and writes both recipes"
    command = add_command(commands, "new", _new, summary)
    command.add_argument("source", metavar="CHATS", help="an export: a file, a folder, a zip, or a glob in quotation marks")
    words = "fields of the source such as format=whatsapp or gap_minutes=60"
    command.add_argument("overrides", nargs="*", metavar="field=value", help=words)
    assistant = "whom the model is to become (without it you are asked); again for another name of the same person"
    command.add_argument("--assistant", action="append", default=[], metavar="NAME", help=assistant)
    command.add_argument("--name", help="of the data set, the recipes and the run (default: from CHATS)")
    model = "checkpoint to fine-tune (default: SmolLM2-135M-Instruct, for chats in European languages)"
    command.add_argument("--model", metavar="CHECKPOINT", help=model)
    command.add_argument("--from-scratch", action="store_true", help="a new small model instead, with a tokenizer of its own")
    command.add_argument("--system", metavar="TEXT", help="system message of every dialogue")
    command.add_argument("--samples", type=int, default=2, metavar="N", help="dialogues to show (default 2)")
    command.add_argument("--seed", type=int, help="of the random sample (default: another one each time)")
    command.add_argument("--force", action="store_true", help="write recipes that exist again")

    command = add_command(commands, "help", _help, "the help of a command")
    command.add_argument("words", metavar="COMMAND", nargs="*", help="for example: data build")
    command = add_command(commands, "recipes", _recipes, "the shipped recipes: model, memory, and time on a card of each class")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command = add_command(commands, "schema", _schema, "JSON schema of recipes, by which editors complete and check them")
    command.add_argument("kind", nargs="?", choices=("train", "data", "sweep"), default="train", help="default: train")
    command = add_command(commands, "completion", _completion, "script that completes commands in your shell")
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _help(options: argparse.Namespace) -> int:
    parser, given = options.parser, list[str]()
    for word in options.words:
        below = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if below is None:
            parser.error(f"{word!r}: `{' '.join(given)}` has no subcommands")
            break  # not reached
        try:
            parser._check_value(below, word)
        except argparse.ArgumentError as error:
            parser.error(str(error))
        parser, given = below.choices[word], [*given, word]
    print(in_this_shell(overview(parser)) if not options.words else parser.format_help(), end="")
    return 0


def overview(parser: argparse.ArgumentParser) -> str:
    """All commands by what they are for, a line each."""
    below = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    about = {action.dest: str(action.help) for action in below._choices_actions}
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "others": tuple(name for name in about if name not in grouped)}
    lines = [f"{parser.description} `chatmill help COMMAND` says more.", ""]
    for title, names in groups.items():
        known = [name for name in names if name in about]
        lines += [title, *(f"  {name:<11} {about[name]}" for name in known), ""] if known else []
    return "\n".join(
        [*lines, "The first steps: chatmill data build chitchat-scratch, chatmill train tiny, chatmill chat runs/tiny", ""]
    )


def _recipes(options: argparse.Namespace) -> int:
    from ..jobs.recipe_table import recipes_command

    return recipes_command(options.json)


def _schema(options: argparse.Namespace) -> int:
    from .schema import schema_of

    print(schema_of(options.kind), end="")
    return 0


def _completion(options: argparse.Namespace) -> int:
    from .completion import completion_script

    print(completion_script(options.parser, options.shell))
    return 0


def _new(options: argparse.Namespace) -> int:
    from ..own_chats.new import Choices, new

    names = ("source", "name", "model", "from_scratch", "system", "samples", "seed", "force")
    given = {name: getattr(options, name) for name in names}
    return new(Choices(fields=options.overrides, assistants=options.assistant, **given))
