"""What a reply with calls or a thought must say, and where it ends.

check_said(message, said)         # TemplateRefusedError if words, a name or a value of a call is missing
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..budget import TemplateRefusedError


def last_token(text: str, tokens: re.Pattern[str]) -> tuple[int, int] | None:
    """(start, stop) of the token with which a text ends, blanks apart; None if it ends otherwise."""
    found = None
    for match in tokens.finditer(text):
        found = match.span()
    return found if found is not None and not text[found[1] :].strip() else None


def with_thought_inside(message: Mapping[str, Any], thought: str, tag: str) -> dict[str, Any]:
    """A reply whose content begins with its thought, for templates that know no field for it."""
    if f"</{tag}>" in message["content"]:
        return dict(message)
    return {**message, "content": f"<{tag}>\n{thought}\n</{tag}>\n\n{message['content']}"}


_CLOSING = re.compile(r"\s*(?:</\w+>|<\|[^|<>]*\|>|<[^<>\s|]*\|>|\[/\w+\])?\s*")


def thought_end(said: str, thought: str | None) -> int:
    """Number of characters of a reply that are its thought, the mark that closes it included; 0 if it is not said."""
    text = (thought or "").strip()
    at = said.find(text) if text else -1
    if at < 0:
        return 0
    closing = _CLOSING.match(said, at + len(text))
    return at + len(text) if closing is None else closing.end()


def check_said(message: Mapping[str, Any], said: str) -> None:
    """Raise TemplateRefusedError if the words, or a name or value of a call, of a reply is not in what the template prints."""
    missing = missing_part(message, said)
    if missing is not None:
        raise TemplateRefusedError(f"chat template: it loses part of a reply that calls a tool\nThe part is {missing[:60]!r}.")


def missing_part(message: Mapping[str, Any], said: str) -> str | None:
    """The first part of a reply with calls that is not said; None where all of it is."""
    squeezed = _squeeze(said)
    words = message["content"]
    if words.strip() and _squeeze(words) not in squeezed:
        return str(words)
    for call in message.get("tool_calls", ()):
        function = call["function"]
        if function["name"] not in said:
            return str(function["name"])
        for leaf in _leaves(function["arguments"]):
            if not any(_squeeze(form) in squeezed for form in _forms(leaf)):
                return str(leaf)
    return None


def _forms(leaf: str) -> Iterator[str]:
    """A text as it is, and as JSON writes it."""
    yield leaf
    for ascii_only in (False, True):
        yield json.dumps(leaf, ensure_ascii=ascii_only)[1:-1]


def _leaves(value: Any) -> Iterator[str]:
    """Keys and texts of a JSON value; numbers may be written in several ways."""
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            inner = None
        if isinstance(inner, dict | list):
            yield from _leaves(inner)
        else:
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _squeeze(text: str) -> str:
    return "".join(text.split()).casefold()
