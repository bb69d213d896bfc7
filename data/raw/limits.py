"""How large one line, one record, one file and one archive may be, and reading lines within these limits.

    for number, line in bounded_lines(stream): ...      # line None: it was too long, and was read over in pieces

A file of a few megabytes can unpack to one line of gigabytes. What goes beyond a limit is dropped and counted where it is one
record, and refused by name where it is a file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, Any, AnyStr, Protocol, TypeVar

from ..ledger import Ledger

RECORD_CHARS = 32 << 20  # of one line, JSON value or row of a table; bytes where bytes are read
WHOLE_BYTES = 64 << 20  # of a file, mail or document that has to be in memory as a whole
UNPACKED_FREE = 1 << 30  # bytes that any file may unpack to
UNPACKED_RATIO = 200  # times its packed size that a file may unpack to beyond that; chats reach 30
TOO_LONG = f"longer than {RECORD_CHARS >> 20} million characters"


class UnpackedTooLargeError(Exception):
    """More comes out of a compressed file than any chats would."""


_Text = TypeVar("_Text", str, bytes, covariant=True)


class Lines(Protocol[_Text]):
    """A stream that can be read line by line."""

    def readline(self, size: int = -1, /) -> _Text:
        """The next line, or its first `size` characters."""
        ...


def bounded_lines(stream: Lines[AnyStr], first: int = 1) -> Iterator[tuple[int, AnyStr | None]]:
    """(number, line with its end) of all lines; None in place of one that is longer than RECORD_CHARS."""
    number = first - 1
    while line := stream.readline(RECORD_CHARS):
        number += 1
        if len(line) < RECORD_CHARS or _ends(line):
            yield number, line
            continue
        while line and not _ends(line):
            line = stream.readline(1 << 20)
        yield number, None


def _ends(line: str | bytes) -> bool:
    return line[-1:] in ("\n", "\r", b"\n")


def check_unpacked(unpacked: int, packed: int) -> None:
    """Raise UnpackedTooLargeError for a file of `packed` bytes that unpacks to at least `unpacked`."""
    if unpacked > UNPACKED_FREE + UNPACKED_RATIO * packed:
        raise UnpackedTooLargeError(
            f"its {packed:,} bytes unpack to more than {UNPACKED_FREE:,} bytes plus {UNPACKED_RATIO} times its size"
        )


class MessageLines(list[str]):
    """The lines of one message; those beyond RECORD_CHARS are left out and counted."""

    size = 0

    def add(self, line: str, where: str, ledger: Ledger) -> None:
        """One more line. where: file:line."""
        self.size += len(line) + 1
        if self.size > RECORD_CHARS:
            ledger.change(f"line of a message {TOO_LONG} left out", where)
        else:
            self.append(line)


class Unpacked(io.RawIOBase):
    """The bytes of a decompressor, counted against the size of what it reads."""

    def __init__(self, file: IO[bytes] | io.RawIOBase, packed: int) -> None:
        self.file: Any = file
        self.packed, self.count = packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        self.count += len(data)
        check_unpacked(self.count, self.packed)
        buffer[: len(data)] = data
        return len(data)
