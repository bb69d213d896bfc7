"""Printed commands work as they are printed: by name where the shell finds this program, else by its path."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from chatmill import shell
from chatmill.launcher.__main__ import build_parser


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with .venv/bin/{python,chatmill,activate}, this process being its python, and nothing on the PATH."""
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "chatmill"):
        (bin_folder / name).write_text('#!/bin/sh\necho "$@"\n')
        (bin_folder / name).chmod(0o755)
    (bin_folder / "activate").write_text(f"PATH={bin_folder}:$PATH\n")
    monkeypatch.setattr(sys, "executable", str(bin_folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.chdir(tmp_path)
    return bin_folder


def runs(line: str) -> str:
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.strip()


def test_a_command_is_printed_as_the_shell_finds_it(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell.own_command() == ".venv/bin/chatmill" and shell.activation() == "source .venv/bin/activate"
    assert runs(f"{shell.own_command()} doctor") == "doctor"
    assert runs(f"{shell.activation()} && {shell.own_command(activated=True)} doctor") == "doctor"
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin:/bin")
    assert shell.own_command() == "chatmill" and shell.activation() is None


def test_another_chatmill_on_the_path_is_not_this_one(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = environment.parent / "other"
    other.mkdir()
    (other / "chatmill").write_text("#!/bin/sh\n")
    (other / "chatmill").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:/usr/bin:/bin")
    assert shell.own_command() == ".venv/bin/chatmill"


def test_a_source_tree_without_a_script_runs_the_module(environment: Path) -> None:
    (environment / "chatmill").unlink()
    assert shell.own_command() == ".venv/bin/python -m chatmill" and shell.activation() is None


def test_sentences_get_commands_that_can_be_typed(environment: Path) -> None:
    said = "Run `chatmill doctor` or chatmill data build X; chatmill needs torch: pip install 'chatmill[gpu]', ./chatmill train"
    assert shell.in_this_shell(said) == said.replace("`chatmill doctor", "`.venv/bin/chatmill doctor").replace(
        "chatmill data", ".venv/bin/chatmill data"
    )


def test_every_command_is_known_to_the_sentences() -> None:
    actions = build_parser()._actions
    names = next(set(a.choices) for a in actions if isinstance(a, argparse._SubParsersAction))
    assert names <= set(shell.COMMANDS)


def test_python_m_chatmill_is_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "chatmill", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("chatmill ")
