"""JSON values from the front of a stream of text, one at a time; memory holds one of at most RECORD_CHARS.

text = JsonText(stream); text.peek() == "{"; text.value()
"""

from __future__ import annotations

import json
import re
from typing import IO, Any

from .limits import RECORD_CHARS, TOO_LONG

_PIECE_CHARS = 1 << 20
_BLANK = re.compile(r"[\s,]*")
_STRUCTURE = re.compile(r'["\[\]{}]')
_IN_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.S)
_LONGEST_WORD = 20  # a number or word that the end of a piece may cut; errors before that are no cuts


class TooLongError(ValueError):
    """A value of more than RECORD_CHARS."""


class JsonText:
    """A stream of text with a place in it."""

    def __init__(self, text: IO[str]) -> None:
        self.text, self.data, self.position = text, "", 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Next character that is neither blank nor comma; empty at the end."""
        while True:
            match = _BLANK.match(self.data, self.position)
            self.position = match.end() if match else self.position
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
