"""Raw input files: finding them, opening them through their compression, looking at their beginnings.

A RawFile is a path or one member of a zip. Everything is streamed; nothing is unpacked to disk.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from chatmill.config import ConfigError

HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file on disk, or `member` of the zip at path."""

    path: Path
    member: str | None = None

    @property
    def label(self) -> str:
        """Short name for lineage and messages, free of folders above the file."""
        return self.path.name if self.member is None else f"{self.path.name}!{self.member}"

    @property
    def stem(self) -> str:
        """Name without compression suffix."""
        name = self.member or self.path.name
        for suffix in (".gz", ".zst", ".bz2", ".xz"):
            name = name.removesuffix(suffix)
        return name

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The uncompressed bytes, streamed."""
        if self.member is not None:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                yield file
            return
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            with gzip.open(self.path, "rb") as file:
                yield file  # type: ignore[misc]
        elif suffix == ".bz2":
            with bz2.open(self.path, "rb") as file:
                yield file
        elif suffix == ".xz":
            with lzma.open(self.path, "rb") as file:
                yield file
        elif suffix == ".zst":
            with _open_zstd(self.path) as file:
                yield file
        else:
            with self.path.open("rb") as file:
                yield file

    @contextmanager
    def text(self, encoding: str = "utf-8") -> Iterator[io.TextIOWrapper]:
        """Text lines; a byte-order mark is skipped, undecodable bytes become U+FFFD (the cleaner counts them)."""
        with self.open() as raw:
            name = "utf-8-sig" if encoding.lower().replace("_", "-") == "utf-8" else encoding
            yield io.TextIOWrapper(raw, encoding=name, errors="replace", newline="")

    def head(self, size: int = HEAD_BYTES) -> bytes:
        """The first bytes."""
        with self.open() as file:
            return file.read(size)


@contextmanager
def _open_zstd(path: Path) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading .zst needs the package zstandard (pip install zstandard), or unpack the file"
        ) from error
    # Reddit's dumps use a 2 GiB window.
    with path.open("rb") as raw, zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(raw) as reader:
        yield reader


def find_files(pattern: str) -> list[RawFile]:
    """Files named by a path, a folder (all files in it) or a glob, sorted; members of zips one by one."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        paths = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]  # noqa: PTH207 (a pattern)
    if not paths:
        raise ConfigError(f"source {pattern!r}: no such file, folder or matching glob")
    files: list[RawFile] = []
    for p in paths:
        if p.suffix.lower() == ".zip":
            with zipfile.ZipFile(p) as archive:
                files += [RawFile(p, name) for name in sorted(archive.namelist()) if not name.endswith("/")]
        else:
            files.append(RawFile(p))
    return files
