"""Records of a run that wait in memory while the disk is full: a failed line of metrics.jsonl does not end a run.

    files = WaitingFiles(folder)
    files.append("metrics.jsonl", line)     # written now with everything that waited, or later
    files.replace("checkpoints/best.json", text)

Every further write tries again. What still waits when the run ends is newer than the newest checkpoint, because a checkpoint
needs far more room: the same command computes it again. Any other disk error is raised.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from pathlib import Path

from chatmill.files import replace_text
from chatmill.run_files import append_text

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, a limit on file sizes


def is_full(error: OSError) -> bool:
    """Whether a write failed only for lack of space."""
    return error.errno in _FULL


def warn(text: str) -> None:
    """A line on stderr. That may be a file on the full disk: the line then comes with the next one that fits, or is lost."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError as error:
        if not is_full(error):
            raise


class WaitingFiles:
    """Small files of one folder with one writing process; training and the checkpoint writer use it from two threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines: dict[str, list[str]] = {}
        self._texts: dict[str, str] = {}
        self._full_since: float | None = None
        self._lock = threading.Lock()

    def append(self, name: str, line: str) -> None:
        """Add a line (with its newline) to a file. Raises OSError for other errors than a full disk."""
        with self._lock:
            self._lines.setdefault(name, []).append(line)
            self._write()

    def replace(self, name: str, text: str) -> None:
        """Replace the text of a file in one step."""
        with self._lock:
            self._texts[name] = text
            self._write()

    def _write(self) -> None:
        waited = sum(map(len, self._lines.values())) + len(self._texts) - 1
        try:
            for name in list(self._lines):
                append_text(self.folder / name, "".join(self._lines[name]))
                del self._lines[name]
            for name in list(self._texts):
                replace_text(self.folder / name, self._texts[name])
                del self._texts[name]
            if self._full_since is not None:
                since, self._full_since = self._full_since, None
                event = {"time": round(time.time(), 3), "event": "disk_full", "seconds": round(time.time() - since, 3)}
                append_text(self.folder / "events.jsonl", json.dumps(event | {"waited": waited}) + "\n")
        except OSError as error:
            if not is_full(error):
                raise
            if self._full_since is None:
                self._full_since = time.time()
                warn(f"warning: {self.folder}: {error.strerror}; its records wait in memory, training goes on")
