"""Small files that are old or new but never half, and folders whose names outlast a power cut.

    replace_text(path, text)     a reader sees the old text or the new one
    write_durably(path, data)    the same, and so does whoever looks after a power cut
    sync(path)                   what was written to a file or folder is on the disk

Standard library only: every part uses it, and login nodes have no torch.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write beside and rename. Two processes that do so at once leave one of their texts."""
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_durably(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: the file is either absent, old or whole."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file or folder; a folder's makes the renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
