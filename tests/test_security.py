"""What SECURITY.md promises: every line under a promise names tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tests.launcher import fuzz_readers

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def lines_of_promises(text: str) -> list[str]:
    """The items of the lists under "Promises", each as one line."""
    promises = text.partition("\n## Promises\n")[2].partition("\n## ")[0]
    return [" ".join(item.split()) for item in re.split(r"^(?:- |### .*)", promises, flags=re.MULTILINE) if item.strip()]


def proofs_of(line: str) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::\w+)`", line)


def unproven(text: str) -> list[str]:
    """Lines of promises that name no test, and the tests named that are none."""
    wrong = [line for line in lines_of_promises(text) if not proofs_of(line)]
    for name in proofs_of(" ".join(lines_of_promises(text))):
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8")) if (ROOT / path).is_file() else ast.Module([], [])
        found = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
        if not function.startswith("test_") or function not in found:
            wrong.append(name)
    return wrong


def test_every_line_of_a_promise_names_tests_that_exist() -> None:
    assert len(lines_of_promises(TEXT)) > 15 and not unproven(TEXT)
    assert [int(n) for n in re.findall(r"^### (\d)\. ", TEXT, flags=re.MULTILINE)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("- We promise.", "We promise."),
        ("- We promise. Tests: `tests/test_files.py::test_that_is_not_there`", "tests/test_files.py::test_that_is_not_there"),
        ("- We promise. Tests: `tests/nowhere.py::test_x`", "tests/nowhere.py::test_x"),
        ("- We promise. Tests: `tests/test_security.py::unproven`", "tests/test_security.py::unproven"),
    ],
)
def test_a_line_without_a_test_is_found(line: str, wrong: str) -> None:
    assert unproven(f"\n## Promises\n\n### 1. x\n\n{line}\n\n## Not promised\n\n- All else.\n") == [wrong]


def test_mutated_files_of_other_kinds_raise_nothing_but_the_named_error() -> None:
    assert not any(fuzz_readers.fuzz(20).values())
