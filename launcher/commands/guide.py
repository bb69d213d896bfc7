"""`chatmill new`: the way in for somebody with chats of their own."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_command


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


def _new(options: argparse.Namespace) -> int:
    from ..own_chats.new import Choices, new

    names = ("source", "name", "model", "from_scratch", "system", "samples", "seed", "force")
    given = {name: getattr(options, name) for name in names}
    return new(Choices(fields=options.overrides, assistants=options.assistant, **given))
