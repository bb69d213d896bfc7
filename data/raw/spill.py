"""A table on disk for importers that must see a whole file before they can yield anything: Reddit, mailboxes, Stack Exchange.

    with Spill("CREATE TABLE mails (thread, time REAL, entry)") as db:
        db.execute("INSERT INTO mails VALUES (?, ?, ?)", (thread, time, packed(text))); ...
        for (entry,) in db.execute("SELECT entry FROM mails ORDER BY …"): text = unpacked(entry)

It uses sqlite3 of the standard library, in a file that is deleted when the import ends. The cache is bounded and sorting uses
the disk too, so memory does not grow with the raw file. TMPDIR needs about the size of the unpacked file.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CACHE_KIB = 16_384


class Spill:
    """A temporary database. No other process opens it and a crash may lose it: no journal, no sync, one transaction."""

    def __init__(self, *schema: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chatmill-import-")
        self._db = sqlite3.connect(Path(self._folder.name) / "spill.sqlite", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "temp_store=FILE", "mmap_size=0"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        for statement in schema:
            self._db.execute(statement)
        self._db.execute("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._db.close()
        self._folder.cleanup()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Run a statement; its rows, one by one."""
        return self._db.execute(statement, values)

    def one(self, statement: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row, if there is one."""
        found: tuple[Any, ...] | None = self._db.execute(statement, values).fetchone()
        return found


def packed(*values: Any) -> str:
    """JSON values as ASCII: a lone surrogate (half of an emoji, as raw files have it) cannot be stored as text."""
    return json.dumps(values)


def unpacked(entry: str) -> list[Any]:
    """Inverse of packed."""
    values: list[Any] = json.loads(entry)
    return values


def key(text: str) -> str:
    """A raw file's key as a key of the table; unusual ones stay apart from each other."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
