"""Objects of a JSON Lines file, or of one JSON array, with the line or position each came from.

Lines are streamed; an array is decoded element by element from a sliding buffer, so memory holds one element, not the file.
A line or element that is itself a list of messages or of texts, `[{"role": …}, …]` or `["hi", "hello"]`, counts as the object
{"messages": […]} or {"dialog": […]}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from ..ledger import Ledger
from .files import RawFile

_PIECE_CHARS = 1 << 20
_BLANK = re.compile(r"[\s,]*")
_LINES_TRIED = 5
_FIRST_LINE_BYTES = 1 << 18
_SPEAKERS = ("role", "from", "sender", "speaker")


def json_lines(file: RawFile, encoding: str, ledger: Ledger) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object); for an array, (element number from 1, object). What is not an object is counted."""
    numbered = _array(file, encoding, ledger) if _is_array(file) else _lines(file, encoding, ledger)
    for number, value in numbered:
        record = _as_object(value)
        if record is not None:
            yield number, record
        else:
            ledger.drop("not a JSON object", f"{file.label}:{number}: {type(value).__name__}")


def _is_array(file: RawFile) -> bool:
    """One array rather than lines? A span was cut at line ends, so it is never an array."""
    if file.span is not None:
        return False
    with file.open() as raw:
        start = raw.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start.startswith(b"["):
            return False
        first, feed, more = (start + raw.readline(_FIRST_LINE_BYTES)).partition(b"\n")
        more += raw.read(1024) if feed else b""
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return True
    # The first line is whole: if more follows, each line is a list of its own.
    return not more.strip() and not _is_dialogue(value)


def _is_dialogue(value: Any) -> bool:
    """A list of messages or of texts."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(item, str) for item in value):
        return True
    return all(isinstance(item, dict) and any(key in item for key in _SPEAKERS) for item in value)


def _as_object(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict):
        return value
    if _is_dialogue(value):
        return {"dialog": value} if isinstance(value[0], str) else {"messages": value}
    return None


def _lines(file: RawFile, encoding: str, ledger: Ledger) -> Iterator[tuple[int, Any]]:
    for number, line in file.lines(encoding):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            ledger.drop("not JSON", f"{file.label}:{number}: {error}")


def _array(file: RawFile, encoding: str, ledger: Ledger) -> Iterator[tuple[int, Any]]:
    decoder, buffer, number, size = json.JSONDecoder(), "", 0, _PIECE_CHARS
    with file.text(encoding) as text:
        piece = text.read(size)
        buffer = piece.lstrip()[1:]
        while True:
            blank = _BLANK.match(buffer)
            buffer = buffer[blank.end() :] if blank else buffer
            if buffer.startswith("]"):
                return
            try:
                value, end = decoder.raw_decode(buffer)
            except RecursionError as error:
                ledger.drop("not JSON", f"{file.label}: after element {number}: {error}")
                return
            except ValueError as error:
                piece = text.read(size)
                if not piece:
                    ledger.drop("not JSON", f"{file.label}: after element {number}: {error}")
                    return
                buffer += piece
                size *= 2  # a long element is retried O(log) times
                continue
            number, size = number + 1, _PIECE_CHARS
            yield number, value
            buffer = buffer[end:]


@lru_cache(maxsize=2)  # every importer asks for it
def first_object(head: bytes) -> dict[str, Any] | None:
    """The first object of JSON lines or of an array, if the head contains it completely. Broken lines before it are skipped."""
    text = head.decode("utf-8-sig", "ignore").lstrip()
    decoder = json.JSONDecoder()
    if text.startswith("["):
        try:
            value, _ = decoder.raw_decode(text.split("\n")[0])
        except (ValueError, RecursionError):
            value = None
        if _is_dialogue(value):
            return _as_object(value)
        text = text[1:].lstrip()
    for start in (text, *text.split("\n")[1:_LINES_TRIED]):
        try:
            value, _ = decoder.raw_decode(start.lstrip())
        except RecursionError:
            return None
        except ValueError:
            if not start.lstrip().startswith("{"):
                return None
            continue
        return _as_object(value)
    return None
