"""Walks the header of a GGUF file before a library reads it: every count must fit into the file.

    check_header(path)      # ConfigError for a header that is cut short, or asks for more than the file holds

The library trusts the counts: an array of 2^62 entries in a file of 100 bytes fills the memory. Here each is compared with what
is left of the file, and nothing is kept.
Format: the GGUF specification of ggml: magic, version, counts of tensors and values; then the values; then the tensors.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path

from chatmill.config import ConfigError

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
TEXT, ARRAY = 8, 9
MOST_DIMENSIONS = 4
MOST_ELEMENTS_PER_BYTE = 8  # no quantised type has less than one bit for an element
SMALLEST_TEXT, SMALLEST_VALUE, SMALLEST_TENSOR = 8, 8 + 4 + 1, 8 + 4 + 4 + 8


class _Walk:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.order = data, path, 8, "<"

    def number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        self.skip(size)
        return int(struct.unpack_from(self.order + kind, self.data, self.at - size)[0])

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise ConfigError(f"{self.path}: its header asks for {size} bytes at {self.at}; the file has {len(self.data)}.")
        self.at += size

    def count(self, what: str, least: int) -> int:
        """A count of things that have at least this many bytes each."""
        found = self.number("Q")
        if found * least > len(self.data) - self.at:
            raise ConfigError(
                f"{self.path}: not a readable GGUF file: {found} {what} cannot lie in {len(self.data)} bytes. Fetch it again."
            )
        return found

    def text(self) -> None:
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == TEXT:
            self.text()
        elif kind == ARRAY:
            inner = self.number("I")
            if inner == ARRAY:
                raise ConfigError(f"{self.path}: not a readable GGUF file: a list of lists at {self.at}.")
            entries = self.count("entries of a list", SIZES.get(inner, SMALLEST_TEXT))
            if inner in SIZES:
                self.skip(entries * SIZES[inner])
            else:
                for _ in range(entries):
                    self.value(inner)
        else:
            raise ConfigError(f"{self.path}: not a readable GGUF file: a value of the unknown type {kind} at {self.at}.")


def check_header(path: Path) -> None:
    """Raise ConfigError where the header of a GGUF file does not fit into it."""
    with path.open("rb") as file:
        if len(start := file.read(24)) < 24 or start[:4] != b"GGUF":
            raise ConfigError(f"{path}: not a readable GGUF file (it does not begin as one). Fetch it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk = _Walk(data, path)
            if not start[4] and not start[5]:  # a version of 65,536 and more: the other byte order
                walk.order = ">"
            tensors, values = walk.count("tensors", SMALLEST_TENSOR), walk.count("values", SMALLEST_VALUE)
            for _ in range(values):
                walk.text()
                walk.value(walk.number("I"))
            for _ in range(tensors):
                walk.text()
                dimensions = walk.number("I")
                if dimensions > MOST_DIMENSIONS:
                    raise ConfigError(f"{path}: not a readable GGUF file: a tensor of {dimensions} dimensions.")
                elements = prod(walk.number("Q") for _ in range(dimensions))
                if elements > len(data) * MOST_ELEMENTS_PER_BYTE:
                    raise ConfigError(
                        f"{path}: a tensor of {elements} elements cannot lie in {len(data)} bytes. Fetch it again."
                    )
                walk.skip(4 + 8)
