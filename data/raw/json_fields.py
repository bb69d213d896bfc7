"""Stream large arrays out of a JSON object, `{"name": …, "messages": [ … ]}`, without reading the whole object.

for key, value in object_items(file, {"messages"}): ...     # ("name", "x"), ("messages", first), ("messages", second) …
for path, value in walk(file, {(), ("chats",), ("chats", "*")}): ...     # arrays inside arrays
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from chatmill.config import ConfigError

from .files import RawFile

_PIECE_CHARS = 1 << 20
_BLANK = re.compile(r"[\s,]*")


class _Buffer:
    """Decodes values from the front of a stream of text."""

    def __init__(self, file: RawFile, text: Any) -> None:
        self.file, self.text, self.data, self.position = file, text, "", 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Next character that is neither blank nor comma; empty at the end."""
        while True:
            match = _BLANK.match(self.data, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.data) or not self._more(_PIECE_CHARS):
                return self.data[self.position : self.position + 1]

    def skip(self, character: str) -> None:
        """Skip an expected character."""
        if self.peek() != character:
            raise ConfigError(f"{self.file.label}: not the JSON expected: {character!r} missing, found {self.peek()!r}")
        self.position += 1

    def value(self) -> Any:
        """The next whole JSON value."""
        self.peek()
        size = _PIECE_CHARS
        while True:
            try:
                value, end = self.decoder.raw_decode(self.data, self.position)
            except RecursionError as error:
                raise ConfigError(f"{self.file.label}: the JSON is nested too deeply ({error})") from error
            except ValueError as error:
                if not self._more(size):
                    raise ConfigError(f"{self.file.label}: the JSON ends early or is damaged ({error})") from error
                size *= 2
                continue
            if end == len(self.data) and self._more(size):
                continue  # a number might continue
            self.position = end
            return value

    def _more(self, size: int) -> bool:
        piece = self.text.read(size)
        self.data, self.position = self.data[self.position :] + piece, 0
        return bool(piece)


Path = tuple[str, ...]  # keys from the top; "*" stands for an element of an array
OPENED = object()  # in place of a value: an object that is an element of an entered array begins


def object_items(file: RawFile, arrays: set[str], encoding: str = "utf-8") -> Iterator[tuple[str, Any]]:
    """(key, value) of the top-level object; for keys in `arrays` one item per element."""
    for path, value in walk(file, {(), *((name,) for name in arrays)}, encoding):
        yield path[0], value


def walk(file: RawFile, entered: Collection[Path], encoding: str = "utf-8") -> Iterator[tuple[Path, Any]]:
    """(path, value) of everything outside of the `entered` objects and arrays, in file order; only those are taken apart."""
    with file.text(encoding) as text:
        buffer = _Buffer(file, text)
        if buffer.peek() != "{":
            buffer.skip("{")
        yield from _walk(buffer, (), entered)


def _walk(buffer: _Buffer, path: Path, entered: Collection[Path]) -> Iterator[tuple[Path, Any]]:
    opening = buffer.peek() if path in entered else ""
    if opening == "{":
        if path[-1:] == ("*",):
            yield path, OPENED
        buffer.skip("{")
        while buffer.peek() not in ("}", ""):
            key = buffer.value()
            if not isinstance(key, str):
                raise ConfigError(f"{buffer.file.label}: not the JSON expected: {key!r} in place of a name")
            buffer.skip(":")
            yield from _walk(buffer, (*path, key), entered)
        buffer.skip("}")
    elif opening == "[":
        buffer.skip("[")
        while buffer.peek() != "]":
            yield from _walk(buffer, (*path, "*"), entered)
        buffer.skip("]")
    else:
        yield path, buffer.value()
