"""Atomic and durable writes: a file is old or new, never half-written.

    replace_text(path, text)     readers see the old text or the new one
    write_durably(path, data)    the same, even after a power cut
    sync(path)                   what was written to a file or folder is on the disk
    publish_folder(new, place)   readers see the old folder or the new one, never a mixture

Standard library only: every part uses it, and login nodes have no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def replace_text(path: Path, text: str) -> None:
    """Write to a temporary file and rename it. If two processes do so at once, one of the two texts remains."""
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_durably(path: Path, data: bytes) -> None:
    """Write to a temporary file, fsync, rename: the file is absent, old or complete."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def publish_folder(new: Path, place: Path) -> None:
    """Move the folder `new` to `place`, durably. What was there is removed, after the exchange."""
    sync(new)
    if not place.exists():
        new.replace(place)
    else:
        if not _exchange(new, place):
            # No atomic exchange on this file system: between these two renames the place is empty, never half full.
            old = place.with_name(f".{place.name}.retired-{os.getpid()}")
            shutil.rmtree(old, ignore_errors=True)
            place.replace(old)
            new.replace(place)
            new = old
        if new.is_symlink():  # what it pointed to is somebody else's
            new.unlink()
        else:
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


def sync(path: Path) -> None:
    """fsync a file or folder. Syncing a folder makes the renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
