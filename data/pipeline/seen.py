"""sha256 of raw files, without reading again those that have not changed since they were hashed last.

    seen = SeenFiles.load(folder); digest = seen.sha256(path); seen.save(folder)

A file is unchanged if size, time of its last write and time of its last change of state are the same, to the nanosecond.
Times of the last seconds before it was hashed are not trusted: a write in the same tick of the clock would leave them as they
are. seen.json holds hashes of the paths, not the paths: a data set may be given away.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatmill.files import sha256_file, write_durably

from ..remote.files import RemotePath
from ..shards.manifest import SEEN

SETTLED_NS = 2 * 10**9  # since the last change


class SeenFiles:
    """known: what seen.json holds, {hash of the path: [bytes, mtime, ctime, sha256]}, times in ns."""

    def __init__(self, known: Mapping[str, list[Any]] | None = None) -> None:
        self._known = dict(known or {})
        self._found: dict[str, list[Any]] = {}

    @classmethod
    def load(cls, folder: Path) -> SeenFiles:
        """Of a data-set folder; knows nothing where seen.json is missing or is not what was written."""
        try:
            found = json.loads((folder / SEEN).read_bytes())
            return cls({str(key): list(entry) for key, entry in found.items() if len(entry) == 4})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls()

    def save(self, folder: Path) -> None:
        """Write what was asked for since."""
        write_durably(folder / SEEN, (json.dumps(self._found, indent=0, sort_keys=True) + "\n").encode())

    def sha256(self, path: Path | RemotePath) -> str:
        """Hex sha256 of a file. A remote one is always read."""
        if isinstance(path, RemotePath):
            return path.sha256()
        key = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
        state, now = path.stat(), time.time_ns()
        marks = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        entry = self._known.get(key)
        if entry is None or entry[:3] != marks:
            entry = self._known[key] = [*marks, sha256_file(path)]
        if max(marks[1:]) + SETTLED_NS < now:
            self._found[key] = entry
        return str(entry[3])
