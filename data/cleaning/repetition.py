"""Repetition as measured by Gopher: the share of a text that repeats earlier parts of it.

    repetition_reason(text, RepetitionSection())  ->  None, or "repetition: top 2-gram over 0.2"

Units are words, or characters in scripts written without spaces, where one and a half of them count as a word: an n-gram of the
limits is then 1.5 n characters. The shares of n-grams count the letters of the units, each letter once however many repeated
n-grams contain it, without the first occurrence of each n-gram. Source of the measures and
limits: Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", arXiv:2112.11446, table A1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from ..recipe import RepetitionSection
from .scripts import CHARACTERS_PER_WORD, UNSPACED

_UNIT = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+(?:['’][^\\W_{UNSPACED}]+)*")
_UNSPACED_UNIT = re.compile(f"[{UNSPACED}]")
_PARAGRAPHS = re.compile(r"\n\s*\n")
TOP_SIZES, DUPLICATE_SIZES = (2, 3, 4), (5, 6, 7, 8, 9, 10)


def units_of(text: str, by: Literal["auto", "words", "characters"] = "auto") -> list[str]:
    """Words in folded case, without punctuation; characters where the script has no blanks (auto) or everywhere."""
    folded = text.casefold()
    if by == "characters":
        return [c for c in folded if c.isalnum()]
    return _UNIT.findall(folded) if by == "auto" else re.findall(r"[^\W_]+(?:['’][^\W_]+)*", folded)


def units_per_word(units: Sequence[str]) -> float:
    """1, or CHARACTERS_PER_WORD where most units are characters of a script without spaces."""
    characters = sum(_UNSPACED_UNIT.fullmatch(unit) is not None for unit in units)
    return CHARACTERS_PER_WORD if 2 * characters > len(units) else 1.0


def duplicate_parts(parts: Sequence[str]) -> tuple[float, float]:
    """(share of the parts that occurred before, share of their characters). Blank parts do not count."""
    seen: set[str] = set()
    repeated = repeated_chars = total = total_chars = 0
    for part in (part.strip() for part in parts):
        if part:
            total, total_chars = total + 1, total_chars + len(part)
            if part in seen:
                repeated, repeated_chars = repeated + 1, repeated_chars + len(part)
            seen.add(part)
    return (repeated / total, repeated_chars / total_chars) if total else (0.0, 0.0)


def top_ngram_share(units: Sequence[str], n: int) -> float:
    """Letters of all occurrences of the most common n-gram over all letters; 0 if none occurs twice."""
    counts = Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    letters = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return min(1.0, letters * most / sum(map(len, units)))


def duplicate_ngram_share(units: Sequence[str], n: int) -> float:
    """Letters inside n-grams that occurred before, over all letters."""
    seen: set[tuple[str, ...]] = set()
    repeated = bytearray(len(units))
    for i in range(len(units) - n + 1):
        gram = tuple(units[i : i + n])
        if gram in seen:
            repeated[i : i + n] = b"\1" * n
        seen.add(gram)
    total = sum(map(len, units))
    return sum(len(unit) for unit, again in zip(units, repeated, strict=True) if again) / total if total else 0.0


def shares(text: str, config: RepetitionSection) -> Iterator[tuple[str, float, float]]:
    """(measure, share, limit) of every rule that is on, cheap ones first."""
    units = units_of(text, config.units)
    word = units_per_word(units) if config.units == "auto" else 1.0
    if len(units) < config.min_units * word:
        return
    for name, parts in (("line", text.split("\n")), ("paragraph", _PARAGRAPHS.split(text))):
        limits = getattr(config, f"duplicate_{name}s"), getattr(config, f"duplicate_{name}_chars")
        if limits != (None, None):
            for what, share, limit in zip(
                (f"duplicate {name}s", f"duplicate {name} characters"), duplicate_parts(parts), limits, strict=True
            ):
                if limit is not None:
                    yield what, share, limit
    for n in TOP_SIZES:
        limit = getattr(config, f"top_{n}gram")
        if limit is not None:
            yield f"top {n}-gram", top_ngram_share(units, math.ceil(n * word)), limit
    for n in DUPLICATE_SIZES:
        limit = getattr(config, f"duplicate_{n}grams")
        if limit is not None:
            yield f"duplicate {n}-grams", duplicate_ngram_share(units, math.ceil(n * word)), limit


def repetition_reason(text: str, config: RepetitionSection) -> str | None:
    """The first rule that the text breaks, in the same words for every text, so that reasons can be counted."""
    return next((f"repetition: {what} over {limit:g}" for what, share, limit in shares(text, config) if share > limit), None)


def character_runs(most: int) -> Callable[[str], bool]:
    """Does a text hold a character more than `most` times in a row, blanks aside?"""
    run, step = re.compile(rf"(\S)\1{{{most},}}"), max(1, (most + 1) // 5)
    few = re.compile(rf"(\S)\1{{{(most + 1) // step - 1}}}")  # as such a run shows in every step-th character

    def repeats(text: str) -> bool:
        return len(text) > most and few.search(text[::step]) is not None and run.search(text) is not None

    return repeats
