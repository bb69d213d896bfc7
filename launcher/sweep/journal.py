"""Optuna's journal in a file, in Optuna's format, which a full disk or a kill cannot spoil.

    storage = optuna.storages.JournalStorage(Journal(folder / "journal.log"))

Optuna's own backend appends behind a line that was cut, which makes one line of two: the new record is lost, and with the next
one nothing can be read any more. Here the remains of a cut line are taken away before the next one is written. Nobody has read
them, because a line counts once it has its end. Of such a joined line in an older journal the whole record is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock

from chatmill.config import ConfigError
from chatmill.run_files import append_text

_BEGIN = b'{"op_code":'  # of a record; inside of a JSON string its quotes would be escaped


class Journal(BaseJournalBackend):
    """Records as lines of JSON; several processes may append and read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = JournalFileSymlinkLock(str(path))
        self._offsets = [0]  # where each record that was read begins, and the next one
        path.touch()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The records from a number on, up to the last whole line. Raises ConfigError for a line that is none."""
        number = min(log_number_from, len(self._offsets) - 1)
        with self.path.open("rb") as file:
            offset = file.seek(self._offsets[number])
            while (line := file.readline()).endswith(b"\n"):
                offset += len(line)
                record = self._record(line, number + 1)
                if number + 1 == len(self._offsets):
                    self._offsets.append(offset)
                if number >= log_number_from:
                    yield record
                number += 1

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        for text in (line, line[max(0, line.rfind(_BEGIN)) :]):
            try:
                record: dict[str, Any] = json.loads(text)
                return record
            except ValueError:
                continue
        raise ConfigError(
            f"{self.path}, line {number}: damaged, expected a JSON object. Take a copy of the file from before, "
            "or begin the sweep under another name."
        )

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records: all of them or, if the disk is full, none. Raises OSError."""
        self._lock.acquire()
        try:
            with self.path.open("rb+") as file:
                size = file.seek(0, os.SEEK_END)
                if (end := _end_of_lines(file, size)) < size:
                    file.truncate(end)
            append_text(self.path, "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs), synced=True)
        finally:
            self._lock.release()


def _end_of_lines(file: Any, size: int) -> int:
    """Where the last whole line of an open file ends."""
    end = size
    while end > 0:
        begin = max(0, end - 65536)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return int(begin + found + 1)
        end = begin
    return 0
