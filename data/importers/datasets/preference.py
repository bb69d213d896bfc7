"""Preference data: JSON lines with a better and a worse reply, or with several rated ones.

    {"prompt": "…", "chosen": "…", "rejected": "…"}                      texts, or lists of messages for any of the three
    {"chosen": [messages …], "rejected": [messages …]}                  the shared beginning is the context
    {"prompt": "…", "responses": [{"text": "…", "rating": 4.5}, …]}     best against worst; equal ratings say nothing

Ratings may be called rating, score or overall_score; texts text, response, content or completion; the list responses or
completions. Each becomes a conversation that ends with the better reply, the worse one in meta["rejected"].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Turn
from ...ledger import Ledger
from ...preference import REJECTED
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..records import MALFORMED, BadRecordError, Record, read_records, text_of
from .openai_messages import turn_of

TEXTS = ("text", "response", "content", "completion")
RATINGS = ("rating", "score", "overall_score")
LISTS = ("responses", "completions")


def recognise(head: bytes, name: str) -> bool:
    """chosen and rejected in the first object, or a list of rated replies."""
    first = first_object(head)
    if first is None:
        return b'"chosen"' in head[:20_000] and b'"rejected"' in head
    if {"chosen", "rejected"} <= first.keys():
        return True
    try:
        return _rated(first) is not None
    except MALFORMED:
        return False


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One conversation per pair; a bad line is counted and skipped."""
    yield from read_records(json_lines(file, options.encoding, ledger), _dialogue, file, source, ledger)


def _dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    try:
        turns, rejected = _pair(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRecordError("bad preference record", error) from error
    return turns, {key: record[key] for key in ("id", "license") if key in record} | {REJECTED: rejected}


def _pair(record: dict[str, Any]) -> tuple[tuple[Turn, ...], str]:
    """Turns that end with the better reply, and the worse reply."""
    rated = _rated(record)
    if rated is not None:
        ordered = sorted(rated, key=lambda item: item[0])
        if ordered[0][0] == ordered[-1][0]:
            raise ValueError("all ratings are equal")
        return (*_turns(record["prompt"], "user"), Turn("assistant", ordered[-1][1])), ordered[0][1]
    better, worse = (_turns(record[key], "assistant") for key in ("chosen", "rejected"))
    context = _turns(record["prompt"], "user") if record.get("prompt") else ()
    if context and better[: len(context)] == context:  # the prompt is repeated in both
        context = ()
    if better[-1].role != "assistant" or worse[-1].role != "assistant" or better[:-1] != worse[:-1]:
        raise ValueError("chosen and rejected differ in more than the last reply")
    return (*context, *better), worse[-1].content


def _turns(value: Any, role: str) -> tuple[Turn, ...]:
    if isinstance(value, str):
        return (Turn("user" if role == "user" else "assistant", value),)
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a text or a list of messages, got {type(value).__name__}")
    return tuple(turn_of(message) for message in value)


def _rated(record: dict[str, Any]) -> list[tuple[float, str]] | None:
    replies = next((record[key] for key in LISTS if isinstance(record.get(key), list)), None)
    if replies is None or "prompt" not in record or len(replies) < 2 or not all(isinstance(item, dict) for item in replies):
        return None
    rating = next((key for key in RATINGS if key in replies[0]), None)
    text = next((key for key in TEXTS if key in replies[0]), None)
    if rating is None or text is None:
        return None
    return [(_rating(item[rating]), text_of(item[text])) for item in replies]


def _rating(value: Any) -> float:
    number = float(value)
    if number != number:
        raise BadRecordError("a rating is not a number", value)
    return number
