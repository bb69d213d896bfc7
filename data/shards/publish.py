"""Put a finished folder in the place of an old one, so that a reader sees the one or the other, never a mixture.

publish(Path(".chitchat.work/final"), Path("corpora/chitchat"))
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

from chatmill.files import sync

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def publish(new: Path, place: Path) -> None:
    """Move the folder `new` to `place`. What was there is removed, after the exchange."""
    sync(new)
    if not place.exists():
        new.replace(place)
    else:
        if not _exchange(new, place):
            # No atomic exchange on this file system: between these two renames the place is empty, never half full.
            old = place.with_name(f".{place.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            place.replace(old)
            new.replace(place)
            new = old
        shutil.rmtree(new)
    sync(place.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step where the system can (Linux renameat2)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
