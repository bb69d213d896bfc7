"""Stream large arrays out of a JSON object, `{"name": …, "messages": [ … ]}`, without reading the whole object.

for key, value in object_items(file, {"messages"}): ...     # ("name", "x"), ("messages", first), ("messages", second) …
for path, value in walk(file, {(), ("chats",), ("chats", "*")}): ...     # arrays inside arrays
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from chatmill.config import ConfigError

from ..ledger import shorten
from .files import RawFile
from .json_text import JsonText


class _Buffer(JsonText):
    """The text of a file; what cannot be read in it is a ConfigError."""

    def __init__(self, file: RawFile, text: Any) -> None:
        super().__init__(text)
        self.file = file

    def skip(self, character: str) -> None:
        """Skip an expected character."""
        if self.peek() != character:
            raise ConfigError(f"{self.file.label}: not the JSON expected: {character!r} missing, found {self.peek()!r}")
        self.position += 1

    def value(self) -> Any:
        """The next whole JSON value."""
        try:
            return super().value()
        except ValueError as error:
            raise ConfigError(f"{self.file.label}: the JSON ends early, is damaged or too large ({error})") from error

    def end(self) -> None:
        """Nothing but blanks may follow."""
        if self.peek():
            more = shorten(self.data[self.position : self.position + 200], 40)
            raise ConfigError(
                f"{self.file.label}: more stands behind the end of the JSON: {more!r}. Split a file of several exports."
            )


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
        buffer.end()


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
