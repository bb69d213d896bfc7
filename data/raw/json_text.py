"""JSON values from the front of a stream of text, one at a time; memory holds one of at most RECORD_CHARS.

text = JsonText(stream); text.peek() == "{"; text.value()
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from itertools import islice
from typing import IO, Any

from .limits import RECORD_CHARS, TOO_LONG

_PIECE_CHARS = 1 << 20
_BLANK = re.compile(r"[\s,]*")
_STRUCTURE = re.compile(r'["\[\]{}]')
_IN_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.S)
_BETWEEN = re.compile(r",\s*(?=[{\[])")
_MOST_TRIED = 1000  # places where the next element might begin
_LONGEST_WORD = 20  # a number or word that the end of a piece may cut; errors before that are no cuts


class TooLongError(ValueError):
    """A value of more than RECORD_CHARS."""


class JsonText:
    """A stream of text with a place in it."""

    def __init__(self, text: IO[str]) -> None:
        self.text, self.data, self.position = text, "", 0
        self.decoder = json.JSONDecoder()
        self.indent: str | None = None  # blanks between the line's beginning and the value that peek found

    def peek(self) -> str:
        """Next character that is neither blank nor comma; empty at the end."""
        while True:
            match = _BLANK.match(self.data, self.position)
            if match is not None and match[0]:
                self.position = match.end()
                _, feed, blanks = match[0].rpartition("\n")
                self.indent = blanks if feed and "," not in blanks else None
            if self.position < len(self.data) or not self._more(_PIECE_CHARS):
                return self.data[self.position : self.position + 1]

    def value(self) -> Any:
        """The next whole value. ValueError where there is none; the place stays where it should begin."""
        self.peek()
        size = _PIECE_CHARS
        while True:
            try:
                value, end = self.decoder.raw_decode(self.data, self.position)
            except RecursionError as error:
                raise ValueError(f"nested too deeply ({error})") from error
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.data) - _LONGEST_WORD or error.msg.startswith("Unterminated string")
                if not cut:
                    raise
                if len(self.data) - self.position > RECORD_CHARS:
                    raise TooLongError(TOO_LONG) from error
                if not self._more(size):
                    raise
                size *= 2  # a long value is retried O(log) times
                continue
            if end == len(self.data) and self._more(size):
                continue  # a number might continue
            if end - self.position > RECORD_CHARS:
                raise TooLongError(TOO_LONG)
            self.position = end
            return value

    def skip_value(self) -> None:
        """Go behind the object or list that begins here, by its brackets and quotes, whatever is in it."""
        depth = 0
        while True:
            found = _STRUCTURE.search(self.data, self.position)
            if found is None:
                self.position = len(self.data)
                if not self._more(_PIECE_CHARS):
                    return
                continue
            self.position = found.end()
            if found[0] == '"':
                self._skip_string()
            else:
                depth += 1 if found[0] in "[{" else -1
            if depth <= 0:
                return

    def _skip_string(self) -> None:
        while True:
            match = _IN_STRING.match(self.data, self.position)
            self.position = match.end() if match else self.position
            if self.data[self.position : self.position + 1] == '"':
                self.position += 1
                return
            if not self._more(_PIECE_CHARS):  # a backslash at the end of a piece stays for the next
                self.position = len(self.data)
                return

    def resume(self, fits: Callable[[Any], bool], known: bool) -> bool:
        """Go from an element of an array that is broken to the next one. False, and the place stays, where none is found.

        The next one is the first of: the next line that begins as the line of the broken element does; what stands behind its
        closing bracket; and, if known, the first value behind a comma that `fits`. A value that can be read and does not fit is
        none of them.
        """
        while len(self.data) - self.position < RECORD_CHARS and self._more(_PIECE_CHARS):
            pass
        start, opening = self.position, self.data[self.position : self.position + 1]
        if opening not in ("{", "["):
            return False

        def read(at: int) -> Any:
            try:
                return self.decoder.raw_decode(self.data, at)[0]
            except (ValueError, RecursionError):
                return None

        places = list[int]()
        if self.indent is not None:
            again = re.compile("\n" + re.escape(self.indent + opening))
            for match in again.finditer(self.data, start):
                value = read(match.end() - 1)
                if value is None or fits(value):
                    places.append(match.end() - 1)
                    break
        inside = JsonText(io.StringIO())
        inside.data, inside.position = self.data, start
        inside.skip_value()
        if (following := _BLANK.match(self.data, inside.position)) and "," in following[0]:
            value = read(following.end())
            if self.data.startswith(opening, following.end()) if value is None else fits(value):
                places.append(following.end())
            if not known and isinstance(value, dict):  # an odd quote turns texts inside out: it may lie far behind the next one
                keys, known = value.keys(), True
                fits = lambda found: isinstance(found, dict) and keys <= found.keys()  # noqa: E731
        elif self.data[inside.position : inside.position + 8].lstrip()[:1] == "]":
            places.append(inside.position)
        for match in islice(_BETWEEN.finditer(self.data, start), _MOST_TRIED if known else 0):
            if places and match.end() >= min(places):
                break
            value = read(match.end())
            if value is not None and fits(value):
                places.append(match.end())
                break
        if places:
            self.position = min(places)
        return bool(places)

    def rest(self) -> int:
        """Number of characters from here to the end, which are read over."""
        count = len(self.data) - self.position
        self.data, self.position = "", 0
        while piece := self.text.read(_PIECE_CHARS):
            count += len(piece)
        return count

    def readline(self, size: int = -1, /) -> str:
        """The next line, or its first `size` characters, as files have it."""
        while True:
            end = self.data.find("\n", self.position) + 1
            if not end and (size < 0 or len(self.data) - self.position < size) and self._more(_PIECE_CHARS):
                continue
            start, stop = self.position, end or len(self.data)
            self.position = stop if size < 0 else min(stop, start + size)
            return self.data[start : self.position]

    def _more(self, size: int) -> bool:
        piece = self.text.read(size)
        self.data, self.position = self.data[self.position :] + piece, 0
        return bool(piece)
