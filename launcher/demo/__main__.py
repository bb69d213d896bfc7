"""`make demo [NAME=Millie] [ARGS=...]`: gives a model a name, shows it before and after, then fine-tunes on real chats.

Run:  python -m chatmill.launcher.demo [--name NAME] [--no-open] [--only persona|chats] [section.field=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from chatmill.config import ConfigError

from .demo import demo
from .persona import DEFAULT_NAME, LONGEST_NAME


def main(words: Sequence[str] | None = None) -> int:
    """Exit code of the demo."""
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=__doc__.splitlines()[0] if __doc__ else None)
    name = f"of the model, at most {LONGEST_NAME} characters, for example 小米 (default {DEFAULT_NAME})"
    parser.add_argument("--name", default=os.environ.get("CHATMILL_DEMO_NAME") or DEFAULT_NAME, help=name)
    parser.add_argument("--no-open", action="store_true", help="print the command for the chat page instead of opening it")
    parser.add_argument("--only", choices=("persona", "chats"), help="one of the two parts (default: both)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings of the training on real chats")
    options = parser.parse_args(words)
    try:
        return demo(options.name, options.overrides, open_page=not options.no_open, only=options.only)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
