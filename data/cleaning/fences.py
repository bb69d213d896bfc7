"""Finds fenced code in Markdown, so that no cleaning rule touches it.

    split_fences("see\\n```\\nx = 1\\n```\\nok")  ->  [(False, "see\\n"), (True, "```\\nx = 1\\n```"), (False, "\\nok")]

As in CommonMark, three or more backticks or tildes open a fence, at least as many of the same close it, and an unclosed fence
runs to the end. Unlike in CommonMark, a fence may be indented by any amount, because answers put code into lists.
"""

from __future__ import annotations

import re

_FENCE = re.compile(
    r"^[ \t]*(?P<ticks>`{3,}+)[^`\n]*(?:\n(?:.*?\n)??[ \t]*(?P=ticks)`*+[ \t\r]*$|(?:\n.*)?\Z)"
    r"|^[ \t]*(?P<waves>~{3,}+)[^\n]*(?:\n(?:.*?\n)??[ \t]*(?P=waves)~*+[ \t\r]*$|(?:\n.*)?\Z)",
    re.M | re.S,
)


def has_fence(text: str) -> bool:
    """A quick test: could there be fenced code?"""
    return "```" in text or "~~~" in text


def split_fences(text: str) -> list[tuple[bool, str]]:
    """(is code, part) in order; the parts join to the text, and no part is empty."""
    parts: list[tuple[bool, str]] = []
    position = 0
    for match in _FENCE.finditer(text) if has_fence(text) else ():
        parts += [(False, text[position : match.start()]), (True, match[0])]
        position = match.end()
    return [part for part in [*parts, (False, text[position:])] if part[1]]


def prose(text: str) -> str:
    """The text without its fenced code, which leaves a line feed behind."""
    return "".join("\n" if is_code else part for is_code, part in split_fences(text))
