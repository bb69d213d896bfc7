"""How this program is called in the user's shell, so that a printed command works as it is printed.

    own_command()                             "chatmill", ".venv/bin/chatmill" or ".venv/bin/python -m chatmill"
    activation()                              "source .venv/bin/activate", or None where nothing needs to be activated
    in_this_shell("Run `chatmill doctor`.")   "Run `.venv/bin/chatmill doctor`."

Standard library only.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

# The commands of the program: what follows its name in a sentence is not always one.
COMMANDS = (
    *("bench", "cancel", "chat", "checkpoint", "completion", "data", "doctor", "eval", "export", "generate", "help", "import"),
    *("launch", "logs", "merge", "new", "plan", "recipes", "report", "resume", "schema", "serve", "status", "sweep", "train"),
    "watch",
)
_TYPED = re.compile(rf"(?<![\w./-])chatmill (?={'|'.join(COMMANDS)}\b)")


def own_command(activated: bool = False) -> str:
    """By its name where the shell finds this very program, else by its path. activated: after the line of `activation`."""
    if _is_found() or (activated and activation()):
        return "chatmill"
    script = _script()
    return typed(script) if script.is_file() else f"{typed(Path(sys.executable))} -m chatmill"


def activation() -> str | None:
    """The line that lets the shell find `chatmill`; None where it does, or where there is no environment to activate."""
    shell = Path(os.environ.get("SHELL", "")).name
    endings = {"fish": ".fish", "csh": ".csh", "tcsh": ".csh"}
    activate = _script().with_name(f"activate{endings.get(shell, '')}")
    return f"source {typed(activate)}" if not _is_found() and _script().is_file() and activate.is_file() else None


def in_this_shell(text: str) -> str:
    """The text with the commands in it as they can be typed here."""
    return _TYPED.sub(lambda _: f"{own_command()} ", text)


def _script() -> Path:
    return Path(sys.executable).with_name("chatmill")


def _is_found() -> bool:
    found = shutil.which("chatmill")
    return found is not None and os.path.realpath(found) == os.path.realpath(_script())


def typed(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here)) if path.is_relative_to(here) else str(path))
