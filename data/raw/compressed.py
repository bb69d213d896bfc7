"""Compressed raw files as streams of bytes, whole or refused: a cut or damaged one is named, never read short.

    with open_compressed(path) as file, named_damage("chats.jsonl.gz"):
        first = file.read(100)

A .zst is read to its last frame, as `zstd -d` does (pzstd and `cat a.zst b.zst` write several), and an input that ends within a
frame is an error. The stream_reader of the package zstandard does neither by default: half of a file is read as if it were all.
"""

from __future__ import annotations

import bisect
import bz2
import gzip
import importlib
import io
import itertools
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from chatmill.config import ConfigError

from ..remote.files import RemotePath
from .limits import Unpacked, UnpackedTooLargeError, check_unpacked

ZIP_DEPTH, ZIPS_INSIDE = 3, 1000  # zips in a zip: how deep, and how many in each
# zipfile says by RuntimeError that a member has a password, by NotImplementedError that it knows no such compression.
_DAMAGE = (
    EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError, UnpackedTooLargeError,
    NotImplementedError,
)  # fmt: skip


class _ZstdDamageError(Exception):
    """A .zst that cannot be read to its end."""


@contextmanager
def named_damage(label: str) -> Iterator[None]:
    """Turn a decompressor's errors within into one that names the file."""
    try:
        yield
    except RuntimeError as error:
        if "password" not in str(error):
            raise
        raise ConfigError(f"source {label}: it has a password. Unpack it, and give what was in it.") from error
    except (*_DAMAGE, _ZstdDamageError, OSError) as error:
        # bz2 says "Invalid data stream" by a bare OSError; one with a number comes from the disk or the network.
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and str(error) != "Invalid data stream":
            raise
        raise ConfigError(
            f"source {label}: damaged, cut off, or not compressed as its name says ({error}). "
            "Fetch it again, rename it, or take it out of the recipe's sources."
        ) from error


@contextmanager
def open_compressed(path: Path | RemotePath) -> Iterator[IO[bytes]]:
    """The bytes of a file, uncompressed by its suffix."""
    suffix = path.suffix.lower()
    with path.open("rb") as raw:
        if suffix not in (".gz", ".bz2", ".xz", ".zst"):
            yield raw
            return
        packed = path.stat().st_size or sys.maxsize  # some web servers do not say
        opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix)
        with _Zstd(raw, path) if opened is None else opened(raw, "rb") as file:
            yield io.BufferedReader(Unpacked(file, packed), 1 << 15)


@contextmanager
def open_zip(path: Path | RemotePath, inside: tuple[str, ...] = ()) -> Iterator[Zip]:
    """An archive, for its names or members. Its directory is read once, not once per member.

    inside: the zips on the way to it, names that each lie in the one before.
    """
    with named_damage("!".join((path.name, *inside))):
        yield _opened(path, inside, path.stat().st_mtime_ns if isinstance(path, Path) else 0, os.getpid())


class Zip:
    """An open archive with its sorted names."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        try:
            self.archive = zipfile.ZipFile(self.raw)
            packed = self.raw.seek(0, io.SEEK_END)
            check_unpacked(sum(member.file_size for member in self.archive.infolist()), packed)
        except BaseException:
            self.raw.close()
            raise
        self.names = sorted(set(self.archive.namelist()))

    def __contains__(self, member: str) -> bool:
        return member in self.archive.NameToInfo

    def below(self, folder: str) -> list[str]:
        """Members whose names begin with `folder`, which ends in a slash; not itself."""
        first = bisect.bisect_right(self.names, folder)
        return list(itertools.takewhile(lambda name: name.startswith(folder), self.names[first:]))

    @contextmanager
    def open(self, member: str) -> Iterator[IO[bytes]]:
        """The bytes of a member. A directory may say too little about its size: what comes out is counted, too."""
        info = self.archive.getinfo(member)
        with self.archive.open(info) as file:
            yield io.BufferedReader(Unpacked(file, info.compress_size), 1 << 15)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            self.raw.close()


@lru_cache(maxsize=4)
def _opened(path: Path | RemotePath, inside: tuple[str, ...], written_ns: int, process: int) -> Zip:
    """An archive that stays open. process: a child must not move the place of its parent's file.

    One inside another is copied to a temporary file, because a zip is read from its end.
    """
    if not inside:
        return Zip(path.open("rb"))
    with open_zip(path, inside[:-1]) as outer, outer.open(inside[-1]) as packed:
        raw = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the archive)
        shutil.copyfileobj(packed, raw, 1 << 20)
    return Zip(raw)


def zip_files(path: Path | RemotePath, inside: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """(zips on the way, name) of every file in an archive and in the zips inside it, sorted.

    What computers add of their own (`__MACOSX/`, names that begin with a dot) is passed over. Raises ConfigError where a file
    has a password, or zips lie deeper or are more than in exports; how large they may grow, limits.py says.
    """
    label, found, inner = "!".join((path.name, *inside)), list[tuple[tuple[str, ...], str]](), 0
    with open_zip(path, inside) as zipped:
        names, locked = zipped.names, {m.filename for m in zipped.archive.infolist() if m.flag_bits & 1}
    for name in names:
        parts = name.split("/")
        if name.endswith("/") or parts[0] == "__MACOSX" or parts[-1].startswith("."):
            continue
        if name in locked:
            raise ConfigError(f"source {label}: {name!r}: it has a password. Unpack it, and give what was in it.")
        if not name.lower().endswith(".zip"):
            found.append((inside, name))
            continue
        inner += 1
        if len(inside) + 1 > ZIP_DEPTH or inner > ZIPS_INSIDE:
            limits = f"{ZIP_DEPTH} zips inside each other, {ZIPS_INSIDE:,} side by side"
            raise ConfigError(f"source {label}: {name!r} is one zip too many; exports hold at most {limits}. Unpack it first.")
        found += zip_files(path, (*inside, name))
    return found


@contextmanager
def open_tar(path: Path | RemotePath) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar, to be read member by member."""
    with path.open("rb") as raw, named_damage(path.name), tarfile.open(fileobj=raw, mode="r:") as tar:
        yield tar


class _Zstd(io.RawIOBase):
    """Frame after frame of a .zst to the end of the input."""

    def __init__(self, raw: IO[bytes], path: Path | RemotePath) -> None:
        try:
            self.package = importlib.import_module("zstandard")
        except ImportError as error:
            raise ConfigError(
                f"{path}: reading .zst needs the package zstandard (pip install zstandard), or unpack the file"
            ) from error
        self.raw, self.left, self.rest = raw, b"", b""
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            piece = self.rest or self.raw.read(1 << 16)
            self.rest = b""
            if not piece:
                if self.frame is not None:
                    raise _ZstdDamageError("the file ends before its last frame does")
                break
            if self.frame is None:  # Reddit's dumps use a 2 GiB window
                self.frame = self.package.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                self.left = self.frame.decompress(piece)
            except self.package.ZstdError as error:
                raise _ZstdDamageError(str(error)) from error
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size
