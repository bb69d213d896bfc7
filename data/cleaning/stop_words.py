"""Stop words (the, and, of …) by language, from the package stopwordsiso: finding turns made only of them, and removing them.

    words = stop_words(["en"]);  only_stop_words("And you?", words) -> True;  strip_stop_words("the end of it", words) -> "end"

Stripping makes features for search, not texts for a chat model, which must learn to say function words. So it is off by
default. Scripts written without spaces are judged by whether the text can be cut into stop words; they are not stripped,
because characters inside other words would be removed too.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from chatmill.config import ConfigError

from .fences import prose, split_fences
from .scripts import UNSPACED

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_STRIPPED = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*[^\S\n]*")
_TRAILING = re.compile(r"[^\S\n]+$", re.M)
_UNSPACED = re.compile(f"[{UNSPACED}]")


def stop_words(languages: Sequence[str]) -> frozenset[str]:
    """Stop words of the languages, in folded case. ConfigError for a language without a list."""
    return frozenset().union(*(_of(language) for language in languages))


def known_languages() -> frozenset[str]:
    """Languages that have a list."""
    return frozenset(_package().langs())


def only_stop_words(text: str, words: frozenset[str]) -> bool:
    """Is there at least one word, no code, and nothing but stop words?"""
    found = [word.casefold().replace("’", "'") for word in _WORD.findall(prose(text))]
    if not found or any(is_code for is_code, _ in split_fences(text)):
        return False
    return all(word in words or (_UNSPACED.search(word) is not None and _can_be_cut(word, words)) for word in found)


def strip_stop_words(text: str, words: frozenset[str]) -> str:
    """The text without stop words and the blanks after them."""

    def kept(match: re.Match[str]) -> str:
        return "" if match[0].rstrip().casefold().replace("’", "'") in words else match[0]

    after = _STRIPPED.sub(kept, text)
    return text if after == text else _TRAILING.sub("", after)


def strip_rule(words: frozenset[str]) -> Callable[[str], str]:
    """strip_stop_words as a text rule."""
    return lambda text: strip_stop_words(text, words)


def _can_be_cut(run: str, words: frozenset[str]) -> bool:
    reach = [True] + [False] * len(run)
    for end in range(1, len(run) + 1):
        reach[end] = any(reach[start] and run[start:end] in words for start in range(max(0, end - 8), end))
    return reach[-1]


@lru_cache(maxsize=128)
def _of(language: str) -> frozenset[str]:
    package = _package()
    if not package.has_lang(language):
        raise ConfigError(
            f"clean.stop_words.languages: no list for {language!r}. There are: {', '.join(sorted(package.langs()))}."
        )
    return frozenset(word.casefold().replace("’", "'") for word in package.stopwords(language))


def _package() -> Any:
    try:
        return importlib.import_module("stopwordsiso")
    except ImportError as error:
        raise ConfigError(
            "clean.stop_words needs the package stopwordsiso (pip install 'chatmill[data]'), or set clean.stop_words=null"
        ) from error
