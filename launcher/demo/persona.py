"""The demo's persona: training dialogues that give a model a name, and questions that are kept out of them.

    dialogues("Millie")      [[{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I'm …"}], …]
    questions("Millie")      [Question("English", "persona", "What's your name?", ("Millie",)), …]
    repeated("Millie")       the questions that the training dialogues hold: none

The texts are in persona.yaml, in English and Chinese. The same name gives the same dialogues.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from chatmill.config import ConfigError

TEXTS = Path(__file__).with_name("persona.yaml")
DEFAULT_NAME = "Millie"
DIALOGUES = 100
EXCHANGES = (2, 3, 3, 4)  # in a dialogue, one drawn for each
LONGEST_NAME = 24
Dialogue = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Question:
    """Asked before and after the training. A reply is right if it contains one of `expect`, whatever its case."""

    language: str
    kind: str  # persona or general
    text: str
    expect: tuple[str, ...]

    def is_answered_by(self, reply: str) -> bool:
        """Whether one of the expected words stands in the reply, as a word where the script has spaces between words."""
        return any(_holds(_plain(reply), _plain(word)) for word in self.expect)


def check_name(name: str) -> str:
    """The name in NFC without blanks around it. Raises ConfigError for what cannot be a name."""
    found = unicodedata.normalize("NFC", name).strip()
    if (
        not found
        or len(found) > LONGEST_NAME
        or not found.isprintable()
        or not any(c.isalpha() for c in found)
        or "<|" in found
    ):
        raise ConfigError(
            f"{name[:100]!r} cannot be the model's name: expected 1 to {LONGEST_NAME} printable characters with a letter among "
            "them, for example Millie or 小米."
        )
    return found


def folder_name(name: str) -> str:
    """`persona-Millie`; names that are no plain folder names everywhere become a hash: `persona-2f1d7a90`."""
    plain = re.fullmatch(r"[A-Z][a-z]{0,23}", name)  # two that differ only in case would be one folder on some systems
    return f"persona-{name if plain else hashlib.sha256(name.encode()).hexdigest()[:8]}"


def dialogues(name: str) -> list[Dialogue]:
    """DIALOGUES different dialogues of one to four questions, as many in each language."""
    draw = random.Random(0)
    found: dict[str, Dialogue] = {}
    for language in itertools.cycle(_texts()):
        exchanges = [list(_pairs(topic)) for topic in _texts()[language]]
        chosen = draw.sample(exchanges, k=draw.choice(EXCHANGES))
        turns = [turn for pairs in chosen for turn in _turns(draw.choice(pairs), name)]
        found.setdefault(repr(turns), turns)
        if len(found) == DIALOGUES:
            return list(found.values())
    raise AssertionError("no language in persona.yaml")


def questions(name: str) -> list[Question]:
    """All held-out questions."""
    found = []
    for language, topics in _texts().items():
        for topic in topics:
            for item in topic.get("held_out", ()):
                text, expect = (item, topic["expect"]) if isinstance(item, str) else item
                words = tuple(word.replace("{name}", name) for word in expect)
                found.append(Question(language, topic["kind"], text, words))
    return found


def repeated(asked: Sequence[Question], training: Sequence[Dialogue]) -> list[str]:
    """The questions whose text occurs anywhere in the training dialogues, and those that hold a whole training question.

    Case, punctuation and blanks do not hide a copy.
    """
    turns = [turn for dialogue in training for turn in dialogue]
    everything = "\n".join(_letters(turn["content"]) for turn in turns)
    trained = {_letters(turn["content"]) for turn in turns if turn["role"] == "user"}
    found = []
    for question in asked:
        text = _letters(question.text)
        if text in everything or any(known in text for known in trained):
            found.append(question.text)
    return found


def _pairs(topic: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "pairs" in topic:
        yield from ((ask, reply) for ask, reply in topic["pairs"])
    else:
        yield from itertools.product(topic["ask"], topic["reply"])


def _turns(pair: tuple[str, str], name: str) -> Iterator[dict[str, str]]:
    for role, text in zip(("user", "assistant"), pair, strict=True):
        yield {"role": role, "content": text.replace("{name}", name)}


@cache
def _texts() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))["languages"]
    return found


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _letters(text: str) -> str:
    return "".join(c for c in _plain(text) if c.isalnum())


def _holds(text: str, word: str) -> bool:
    if word.isascii():
        return re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", text) is not None
    return word in text
