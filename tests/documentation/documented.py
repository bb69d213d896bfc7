"""Reads the pages: the fenced blocks and the commands in them, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WITH_COMMANDS = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")]  # which tell of what was
COMMANDS = {
    *("accelerate", "bash", "cd", "chatmill", "cp", "curl", "echo", "eval", "git", "make", "mkdir", "pip", "pytest", "python"),
    *("salloc", "sbatch", "source", "torchrun", "docker"),
}
TYPED = re.compile(rf"(\w+=\S+ )*(\.venv/bin/)?({'|'.join(COMMANDS)})\b")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks; those inside a list are indented."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^([ ]*)```(\w*)[^\n]*\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    return [(language, re.sub(rf"(?m)^{indent}", "", body)) for indent, language, body in found]


def whole_lines(page: Path) -> list[str]:
    """Lines of the blocks without a language, or of a shell, without comments, as one pastes them."""
    bodies = (re.sub(r"\\\n\s*", " ", body) for language, body in blocks(page) if language in ("", "sh", "bash"))
    found = (without_comment(line.strip()) for body in bodies for line in body.splitlines() if TYPED.match(line.strip()))
    return [line for line in found if line]


def shell_lines(page: Path) -> list[str]:
    """The commands of these lines, one by one."""
    parts = (part.strip() for line in whole_lines(page) for part in re.split(r"\s*(?:&&|\|(?!\|))\s*", line))
    return [part for part in parts if part]


def without_comment(line: str) -> str:
    return re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip().removeprefix(".venv/bin/")


def inline_commands(page: Path) -> list[str]:
    """Commands inside `…` that are whole: those with an ellipsis, brackets or a bar are not."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = [" ".join(code.split()) for code in re.findall(r"(?<!`)`(chatmill [^`]+)`(?!`)", text)]
    return [code for code in found if not re.search(r"[…|\[\]]|\.\.\.", code)]
