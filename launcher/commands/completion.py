"""`chatmill completion SHELL`: a script that completes commands, options, files and names of recipes on Tab.

eval "$(chatmill completion bash)"       # in ~/.bashrc; zsh and tcsh likewise
"""

from __future__ import annotations

import argparse
from typing import Any

from chatmill.config import ConfigError

from .arguments import RECIPES

FILES = (
    "checkpoint",
    "file",
    "html",
    "job",
    "out",
    "path",
    "run_dir",
    "source",
    "sweep",
    "against",
    "a",
    "b",
    "others",
    "runs",
)


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for bash, zsh or tcsh. Raises ConfigError without shtab."""
    try:
        import shtab
    except ImportError:
        raise ConfigError("completion needs shtab, which is not installed: pip install shtab") from None
    _mark(parser, shtab.FILE)
    names = {part: " ".join(sorted(file.stem for file in folder.glob("*.yaml"))) for part, folder in RECIPES.items()}
    preamble: Any = {
        "bash": "".join(
            f'_chatmill_{part}_recipes() {{ compgen -W "{words}" -- "$1"; compgen -f -- "$1"; }}\n'
            for part, words in names.items()
        ),
        "zsh": "".join(
            f"_chatmill_{part}_recipes() {{ _alternative 'recipes:recipe:({words})' 'files:file:_files' }}\n"
            for part, words in names.items()
        ),
    }
    return str(shtab.complete(parser, shell=shell, preamble=preamble))


def _mark(parser: argparse.ArgumentParser, files: dict[str, Any]) -> None:
    """Say of every argument what completes it."""
    for action in parser._actions:
        marked: Any = action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _mark(below, files)
        elif action.dest == "recipe":
            part = next(part for part, folder in RECIPES.items() if folder == parser.get_default("recipes"))
            marked.complete = {"bash": f"_chatmill_{part}_recipes", "zsh": f"_chatmill_{part}_recipes", "tcsh": files["tcsh"]}
        elif action.dest in FILES and action.choices is None and action.nargs != 0:
            marked.complete = files
