"""Objects of a JSON Lines file, or of one JSON array, with the line or position each came from.

Lines are streamed; an array is decoded element by element from a sliding buffer, so memory holds one element, not the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..ledger import Ledger
from .files import RawFile

_PIECE_CHARS = 1 << 20
_BLANK = re.compile(r"[\s,]*")
_LINES_TRIED = 5


def json_lines(file: RawFile, encoding: str, ledger: Ledger) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object); for an array, (element number from 1, object). What is not an object is counted."""
    with file.open() as raw:
        start = raw.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    # A span was cut at line ends, so it is never an array.
    numbered = (
        _array(file, encoding, ledger) if start.startswith(b"[") and file.span is None else _lines(file, encoding, ledger)
    )
    for number, value in numbered:
        if isinstance(value, dict):
            yield number, value
        else:
            ledger.drop("not a JSON object", f"{file.label}:{number}: {type(value).__name__}")


def _lines(file: RawFile, encoding: str, ledger: Ledger) -> Iterator[tuple[int, Any]]:
    for number, line in file.lines(encoding):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
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


def first_object(head: bytes) -> dict[str, Any] | None:
    """The first object of JSON lines or of an array, if the head contains it completely. Broken lines before it are skipped."""
    text = head.decode("utf-8-sig", "ignore").lstrip()
    if text.startswith("["):
        text = text[1:].lstrip()
    for start in (text, *text.split("\n")[1:_LINES_TRIED]):
        try:
            value, _ = json.JSONDecoder().raw_decode(start.lstrip())
        except ValueError:
            if not start.lstrip().startswith("{"):
                return None
            continue
        return value if isinstance(value, dict) else None
    return None
