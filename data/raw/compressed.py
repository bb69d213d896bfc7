"""Compressed raw files as streams of bytes, whole or refused: a cut or damaged one is named, never read short.

    with open_compressed(path) as file, named_damage("chats.jsonl.gz"):
        first = file.read(100)

A .zst is read to its last frame, as `zstd -d` does (pzstd and `cat a.zst b.zst` write several), and an input that ends within a
frame is an error. The stream_reader of the package zstandard does neither by default: half of a file is read as if it were all.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from chatmill.config import ConfigError

from ..remote.files import RemotePath

_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError)


class _ZstdDamageError(Exception):
    """A .zst that cannot be read to its end."""


@contextmanager
def named_damage(label: str) -> Iterator[None]:
    """Turn a decompressor's errors within into one that names the file."""
    try:
        yield
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
        if suffix == ".gz":
            with gzip.open(raw, "rb") as file:
                yield file  # type: ignore[misc]
        elif suffix == ".bz2":
            with bz2.open(raw, "rb") as file:
                yield file
        elif suffix == ".xz":
            with lzma.open(raw, "rb") as file:
                yield file
        elif suffix == ".zst":
            with io.BufferedReader(_Zstd(raw, path), 1 << 20) as file:
                yield file
        else:
            yield raw


@contextmanager
def open_zip(path: Path | RemotePath) -> Iterator[zipfile.ZipFile]:
    """An archive, for its names or members."""
    with path.open("rb") as raw, named_damage(path.name), zipfile.ZipFile(raw) as archive:
        yield archive


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
