"""Recipes are YAML from people: what is repeated, endless, or larger than it looks is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from chatmill.config import MAX_YAML_CHARACTERS, ConfigError, Section, load_section, parse_overrides, parse_yaml, read_yaml

NINE = ", ".join(["{}"] * 9)
LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{NINE.replace('{}', '*' + a)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "a billion behind aliases": (LAUGHS, "its aliases stand for"),
    "an alias of itself": ("a: &a [1, *a]", "an alias names what it is part of"),
    "a key twice": ("train: {steps: 1}\nmodel: {}\ntrain: {lr: 2}", "'train' is given twice"),
    "a key twice, further down": ("train: {steps: 1, lr: 2, steps: 3}", "'steps' is given twice"),
    "brackets without end": ("[" * 100_000, "nested too deeply"),
    "a number without end": ("a: " + "9" * 5000, "digit"),
    "no such day": ("a: 2023-99-99", "month must be"),
    "a key that is a list": ("? [1]\n: 2", "unhashable"),
    "a huge file": ("#" * (MAX_YAML_CHARACTERS + 1), "expected at most"),
}


@pytest.mark.parametrize("name", BAD)
def test_yaml_that_cannot_be_meant_is_refused_in_words(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?s)a.yaml: not valid YAML: .*{words}"):
        read_yaml(tmp_path / "a.yaml")
    if "\n" not in text:
        with pytest.raises(ConfigError, match=f"(?s)the value is not YAML.*{words}"):
            parse_overrides([f"a.b={text}"])


def test_aliases_and_merged_sections_work_as_before() -> None:
    value = parse_yaml("base: &base {steps: 1, lr: 2}\none: {<<: *base, lr: 3}\ntwo: [*base, *base]")
    assert value == {"base": {"steps": 1, "lr": 2}, "one": {"steps": 1, "lr": 3}, "two": [{"steps": 1, "lr": 2}] * 2}


class Rule(Section):
    lr: float = 1.0


class Source(Section):
    format: str = "auto"


class Small(Section):
    sources: list[Source] = Field(default_factory=list)
    groups: dict[str, Rule] = Field(default_factory=dict)
    rule: Rule | None = None
    size: int = 1


FILE = "sources: [{format: a}, {format: b}]\nsize: 2\n"
WRONG = {
    "a list's item in a file": ("sources: [{fromat: a}]", [], r"x.yaml: 1 problem:\n  sources.0.fromat: .* mean 'format'"),
    "a list's item": (FILE, ["sources.1.fromat=c"], r"^override sources.1.fromat=c: 1 problem:\n.*mean 'format'"),
    "a mapping's value": (FILE, ["groups.a.lrr=1"], r"^override groups.a.lrr=1: 1 problem:\n.*mean 'lr'"),
    "a section that may be absent": (FILE, ["rule.lrr=1"], r"^override rule.lrr=1: 1 problem:\n.*mean 'lr'"),
    "no such item": (FILE, ["sources.2.format=c"], r"^override sources.2: sources has 2 items, and the first is sources.0$"),
    "both": ("sizes: 2", ["rule.lrr=1"], r"x.yaml with rule.lrr=1: 2 problems"),
    "the file's own": ("sizes: 2", ["rule.lr=1"], r"x.yaml: 1 problem:\n  sizes: .* mean 'size'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_whoever_wrote_a_wrong_key_is_named_with_the_nearest_right_one(name: str, tmp_path: Path) -> None:
    text, words, message = WRONG[name]
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_section(Small, str(tmp_path / "x.yaml"), words, tmp_path)


def test_an_override_reaches_an_item_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(FILE)
    loaded = load_section(Small, str(tmp_path / "x.yaml"), ["sources.1.format=c"], tmp_path)
    assert [source.format for source in loaded.sources] == ["a", "c"]
