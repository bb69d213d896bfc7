"""Pages of the documentation site that follow from the code: recipes, commands, and the files at the root of the repository.

mkdocs runs these hooks (mkdocs.yml), so no copy of a generated page can grow old. Needs neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import atexit
import os
import posixpath
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from chatmill.config import Section  # noqa: E402

# a file at the root -> its page
ROOT_PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
STARTS = {"README.md": "index.md", "README.zh.md": "zh/index.md"}


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give mkdocstrings the code with an `__init__.py` in every folder: it does not look into folders without one."""
    mirror = Path(tempfile.mkdtemp(prefix="chatmill-docs-"))
    atexit.register(shutil.rmtree, mirror, ignore_errors=True)
    for part in ("data", "kernels", "trainer"):
        for file in (ROOT / part).rglob("*.py"):
            place = mirror / "chatmill" / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    for folder in [path for path in mirror.rglob("*") if path.is_dir() and not (path / "__init__.py").exists()]:
        (folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(mirror)]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files at the root of the repository as pages."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they work in the repository become links between pages; the pages of reference get their tables."""
    here = page.file.src_uri
    markdown += recipes_page() if here == "reference/recipes.md" else commands_page() if here == "reference/commands.md" else ""
    named = {page: name for name, page in ROOT_PAGES.items()}
    source = named.get(here, f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        if not path or ":" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        to = (ROOT_PAGES | STARTS).get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(to, posixpath.dirname(here) or '.')}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)


def recipes_page() -> str:
    """Every field of the four kinds of files that users write, from their classes."""
    from chatmill.data.recipe import DataRecipe
    from chatmill.launcher.jobs.job import JobSpec
    from chatmill.launcher.sweep.config import SweepConfig
    from chatmill.trainer.config import Recipe

    lines = [""]
    kinds = (
        ("Training recipe", "train", Recipe),
        ("Data recipe", "data", DataRecipe),
        ("Sweep", "sweep", SweepConfig),
        ("Job of `chatmill launch --job`", "job", JobSpec),
    )
    for title, kind, section in kinds:
        lines += [f"## {title} {{ #{kind} }}", ""]
        for place, part in sections(section, ""):
            if place:
                lines += [f"### {place} {{ #{anchor(kind, place)} }}", ""]
            lines += [*described(part), "", *field_table(part, kind, place), ""]
    return "\n".join(lines)


def sections(section: type[Section], place: str) -> Iterator[tuple[str, type[Section]]]:
    """(dotted place, class) of a config and of all sections inside, in the order in which they are written."""
    yield place, section
    for name, field in section.model_fields.items():
        inner, many = inner_section(field.annotation)
        if inner is not None:
            yield from sections(inner, ".".join(filter(None, (place, name + many))))


def inner_section(annotation: Any) -> tuple[type[Section] | None, str]:
    """The section that a field holds, and how the place of one item is written; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    found = [inner_section(part) for part in get_args(annotation)]
    inner, many = next(((section, more) for section, more in found if section is not None), (None, ""))
    origin = get_origin(annotation)
    return inner, many + (".N" if origin in (list, tuple) else ".NAME" if origin is dict else "")


def anchor(kind: str, place: str) -> str:
    """The anchor of a section, the same whenever the page is made."""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind}-{place}".lower())


def described(section: type[Section]) -> list[str]:
    """The class's docstring; the names of its fields stand out where they are explained."""
    text = re.sub(r"\n(?=\S)", " ", re.sub(r"\n{2,}", "\n\n", paragraphs(section.__doc__ or "")))
    names = "|".join(map(re.escape, section.model_fields))
    shown = re.sub(rf"(?<![\w.`])((?:{names})(?:, (?:{names}))*)(?=: )", lambda m: f"**`{m[1]}`**", text)
    return shown.split("\n")


def paragraphs(text: str) -> str:
    """A docstring whose lines belong together, paragraph by paragraph."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n\n".join(" ".join(part.split("\n")) for part in "\n".join(lines).split("\n\n"))


def field_table(section: type[Section], kind: str, place: str) -> list[str]:
    """A table of the fields: name, values, default."""
    rows = ["| field | value | default |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        inner, many = inner_section(field.annotation)
        at = ".".join(filter(None, (place, name + many)))
        value = f"[{at}](#{anchor(kind, at)})" if inner else values(field.annotation, limits(field.metadata))
        rows.append(f"| `{name}` | {value} | {default(field, inner)} |")
    return rows


def limits(metadata: list[Any]) -> str:
    """What a number may be, in words of mathematics."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {bound:,}" for m in metadata for name, sign in signs.items() if (bound := getattr(m, name, None)) is not None
    ]
    return ", ".join(found)


def values(annotation: Any, bounds: str = "") -> str:
    """What may be written for a field."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(parts[0], limits(list(parts[1:])))
    if origin is Literal:
        return ", ".join(f"`{written(part)}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(values(part, bounds) for part in parts)
    if origin in (list, tuple) and (origin is list or parts[-1] is Ellipsis):
        return f"list of {values(parts[0])}"
    if origin is tuple:
        return f"list of {len(parts)}: {values(parts[0])}"
    if origin is dict:
        return f"mapping to {values(parts[1])}"
    words = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", type(None): "`null`"}
    plain = words.get(annotation, "value")
    return f"{plain} {bounds}" if bounds and annotation in (int, float) else plain


def default(field: Any, inner: type[Section] | None) -> str:
    """The default as it would be written in YAML; empty for a section, whose own table has its defaults."""
    value = field.default_factory() if field.default_factory else field.default
    if value is PydanticUndefined:
        return "required"
    if inner is not None and value is not None:
        return (
            ""
            if not isinstance(value, Section) or value == type(value)()
            else f"`{written(value.model_dump(exclude_defaults=True))}`"
        )
    return f"`{written(value)}`"


def written(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {written(v)}" for name, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(written, value)) + "]"
    return str(value)


def commands_page() -> str:
    """The help of every command, as it is printed."""
    from chatmill.launcher.__main__ import build_parser

    lines = [""]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        for words, parser in leaves(build_parser(), []):
            lines += [f"## chatmill {' '.join(words)}", "", "```text", parser.format_help().rstrip(), "```", ""]
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return "\n".join(lines)


def leaves(parser: argparse.ArgumentParser, words: list[str]) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """(words, parser) of every command that does something itself."""
    below = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if below is None:
        yield words, parser
        return
    for name, inner in below.choices.items():
        yield from leaves(inner, [*words, name])
