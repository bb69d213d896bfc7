"""The documentation says what the program does: the site builds strictly, and every command and snippet is understood.

Commands are parsed by the real argument parser, recipes and overrides are validated, and Python must import. What a page
promises about the outcome of a command is tested where the command is.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatmill.config import ConfigError, Section, parse_overrides
from chatmill.data.importers.registry import IMPORTERS
from chatmill.data.recipe import RECIPES as DATA_RECIPES
from chatmill.data.recipe import DataRecipe, load_data_recipe
from chatmill.launcher.__main__ import build_parser
from chatmill.launcher.jobs.job import JobSpec
from chatmill.launcher.sweep.config import SweepConfig
from chatmill.trainer.config import RECIPES, Recipe, load_recipe

from .documented import PAGES, ROOT, WITH_COMMANDS, blocks, inline_commands, shell_lines

PLACEHOLDER = re.compile(r"^[A-Z][A-Z._]*$")  # RECIPE, DIR, RUN, PATH, STEP ...


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def cases(lines_of: Any) -> list[Any]:
    found = [(page, line) for page in WITH_COMMANDS for line in dict.fromkeys(lines_of(page))]
    return [pytest.param(line, id=f"{name(page)}: {line}") for page, line in found]


def snippets(kind: str) -> list[Any]:
    """The blocks of a language on all pages, as cases of a test."""
    found = [(page, body) for page in WITH_COMMANDS for language, body in blocks(page) if language == kind]
    return [pytest.param(body, id=f"{name(page)}: {body[:30]}") for page, body in found]


def chatmill_commands() -> list[str]:
    """All commands of this program on all pages, each once."""
    found = (line for page in WITH_COMMANDS for line in (*shell_lines(page), *inline_commands(page)))
    return sorted({line for line in found if line.startswith("chatmill ")})


@cache
def parser() -> Any:
    return build_parser()


def test_pages_have_commands() -> None:
    assert len(chatmill_commands()) > 100


def test_every_chatmill_command_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for line in chatmill_commands():
        words = shlex.split(line)[1:]
        if words and PLACEHOLDER.match(words[0]):
            continue  # `chatmill COMMAND --help`
        problem = problem_of(words, capsys)
        if problem:
            wrong.append(f"{line}\n    {problem}")
    assert not wrong, "\n".join(wrong)


def problem_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Why the program would refuse these words; empty if it would not."""
    numbered = ["7" if word in ("N", "STEP", "999") else word for word in words]  # whole numbers
    try:
        options = parser().parse_args(numbered)
    except SystemExit as end:
        said = capsys.readouterr().err.strip().splitlines()
        only_named = [word for word in words if not word.startswith("-")] == words and len(words) <= 3  # `chatmill data build`
        named = only_named and said and "the following arguments are required" in said[-1]
        return "" if not end.code or named else said[-1]
    recipe = getattr(options, "recipe", None)
    try:
        if isinstance(recipe, str):
            check_recipe(recipe, [word for word in getattr(options, "overrides", []) if "…" not in word], words[0] == "data")
    except ConfigError as error:
        return str(error)
    return ""


def check_recipe(recipe: str, overrides: list[str], is_data: bool) -> None:
    """Raise ConfigError if a shipped recipe, or one of the pages, does not take these overrides."""
    overrides = [re.sub(r"=(FOLDER|NEW|SHARE|NAME|[A-Z]{3,})$", "=x", word) for word in overrides]
    folder = DATA_RECIPES if is_data else RECIPES
    place = next((file for file in (folder / f"{recipe}.yaml", ROOT / recipe) if file.is_file()), None)
    if place is None:
        assert PLACEHOLDER.match(recipe) or recipe.endswith((".yaml", ".yml")), f"{recipe}: no such recipe"
        parse_overrides(overrides)
        return
    if is_data:
        load_data_recipe(str(place), overrides)
    else:
        load_recipe(str(place), overrides)


@pytest.mark.parametrize("line", [c for c in cases(shell_lines) if not c.values[0].startswith("chatmill ")])
def test_every_other_command_names_what_exists(line: str) -> None:
    words = [word for word in shlex.split(line) if not re.match(r"^[A-Z_]+=", word)]
    program = words[0]
    if program == "make" and len(words) > 1:
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    if ("-m" in words[:4] and program in ("python", "torchrun")) or (program == "torchrun" and "-m" in words):
        module = words[words.index("-m") + 1]
        assert find_spec(module) is not None, module
    scripts = [word for word in words if re.match(r"^(trainer|slurm|tests|docs|launcher)/\S+\.(py|sh|yaml|txt)$", word)]
    assert all((ROOT / script).is_file() for script in scripts), scripts
    at = next(
        (i for i, word in enumerate(words) if word.endswith(("trainer/train.py", "slurm/train.sh", "trainer.train"))), None
    )
    if at is not None and at + 1 < len(words):
        check_recipe(words[at + 1], words[at + 2 :], False)
    extras = set(re.findall(r"[\w-]+", "".join(re.findall(r"(?:\.|chatmill)\[([^\]]*)\]", line))))
    assert not extras - known_extras()


@cache
def known_extras() -> set[str]:
    import tomllib

    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_every_extra_is_on_the_start_pages() -> None:
    for page in ("docs/index.md", "docs/zh/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == known_extras()


KINDS: tuple[type[Section], ...] = (Recipe, DataRecipe, SweepConfig, JobSpec)


@pytest.mark.parametrize("body", snippets("yaml"))
def test_every_recipe_shown_is_valid(body: str) -> None:
    """A part of a recipe is completed by what it needs."""
    shown = yaml.safe_load(body)
    needs = {"name": "x", "sources": [{"path": "x"}], "tokenizer": {"path": "x"}}
    found = []
    for kind in KINDS:
        whole = (
            {**needs, **shown}
            if kind is DataRecipe
            else {"name": "x", "recipe": "tiny", "space": {}, **shown}
            if kind is SweepConfig
            else shown
        )
        try:
            kind.model_validate(whole)
            return
        except ValueError as error:
            found.append(f"{kind.__name__}: {error}")
    pytest.fail("\n".join(found))


@pytest.mark.parametrize("body", snippets("python"))
def test_every_python_snippet_imports_what_exists(body: str) -> None:
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chatmill"):
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@cache
def messages() -> str:
    """All texts of the program, `…` in place of what is put into them; one per line."""
    texts = []
    files = [
        *(ROOT / "src/chatmill").glob("*.py"),
        *(f for part in ("data", "trainer", "launcher") for f in (ROOT / part).rglob("*.py")),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return "\n".join(texts)


def test_every_message_of_the_troubleshooting_page_is_one_of_the_programs() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    shown = [row.strip() for row in re.findall(r"^\| (`.*?`) \| ", text, flags=re.MULTILINE)]
    shown = [message[1:-1] for message in shown]
    assert len(shown) > 40
    ours = [message for message in shown if message != "chatmill: command not found"]  # said by the shell
    assert [message for message in ours if message.rstrip("… ") not in messages()] == []


def test_the_readmes_fit_a_screen_and_count_the_formats() -> None:
    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 72 and f"{len(IMPORTERS)} " in text


def test_links_of_all_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        local = (target for target in targets if not target.startswith(("http:", "https:", "mailto:")))
        broken += [f"{name(page)}: {target}" for target in local if not (page.parent / target).exists()]
    assert not broken


def test_the_chinese_start_pages_name_the_same_commands() -> None:
    for english, chinese in (("README.md", "README.zh.md"), ("docs/index.md", "docs/zh/index.md")):
        assert shell_lines(ROOT / english) == shell_lines(ROOT / chinese)


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("needs the extra chatmill[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {
        str(page.relative_to(tmp_path / "site")): page.read_text(encoding="utf-8")
        for page in (tmp_path / "site").rglob("*.html")
    }
    for html in pages.values():
        assert not re.search(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//", html)
    recipes = pages["reference/recipes.html"]
    assert "normal to overwrite" not in recipes and 'id="train-optimizer-muon"' in recipes and "data-executor" in recipes
    assert "chatmill data build" in pages["reference/commands.html"] and "--assistant NAME" in pages["reference/commands.html"]
    assert "micro_batch packs of one rank" in pages["reference/python.html"]
