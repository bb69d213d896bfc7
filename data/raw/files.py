"""Raw input files: finding them, opening them through their compression, looking at their beginnings.

A RawFile is a path, a URL, or one member of a zip or tar. Everything is streamed; nothing is unpacked to disk.
"""

from __future__ import annotations

import codecs
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

from chatmill.config import ConfigError

from ..ledger import Ledger
from ..remote.files import RemotePath
from .compressed import named_damage, open_compressed, open_tar, open_zip
from .encodings import SAMPLE_BYTES, likely_encodings, text_encoding
from .limits import TOO_LONG, WHOLE_BYTES, Lines, bounded_lines

HEAD_BYTES = 1 << 16
_TAR_CHATS = (".json", ".jsonl", ".txt")
# Windows programs write UTF-16 with a mark. The longer marks come first: UTF-32's begins like UTF-16's.
_WIDE_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_WIDE = re.compile(r"^utf[-_]?(16|32)([-_]?[lb]e)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file on disk, or `member` of the zip or tar at path.

    inside: zips on the way to the member: names, each inside the one before it.
    entry: of a tar's member, the open tar and the place in it; members() gives it, and it holds until the next member.
    span: only these whole lines of a line-by-line file: first byte, byte after the last, number of lines before.
    folders: how many of the folders above the file its label names.
    """

    path: Path | RemotePath
    member: str | None = None
    span: tuple[int, int, int] | None = None
    folders: int = 0
    entry: tuple[tarfile.TarFile, tarfile.TarInfo] | None = field(default=None, compare=False, repr=False)
    inside: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Short name for lineage and messages, with no more folders above the file than tell it from others."""
        name = "/".join(part for part in str(self.path).split("/")[-1 - self.folders :] if part)
        if self.member is None:
            return name
        if self.entry is not None:
            return f"{name}:{self.member}"
        return "!".join((name, *map(_readable, (*self.inside, self.member))))

    @property
    def member_path(self) -> str:
        """The member and the zips on the way to it; "" for a file of its own."""
        return "" if self.member is None else "!".join((*self.inside, self.member))

    @property
    def stem(self) -> str:
        """Name without compression suffix."""
        name = self.member or self.path.name
        for suffix in (".gz", ".zst", ".bz2", ".xz"):
            name = name.removesuffix(suffix)
        return name

    @contextmanager
    def open(self, encoding: str = "utf-8") -> Iterator[IO[bytes]]:
        """The uncompressed bytes, streamed; text in UTF-16 or UTF-32 (by its mark or by `encoding`) as UTF-8."""
        with named_damage(self.label), self._open_bytes() as raw:
            buffered = cast(Any, raw if hasattr(raw, "peek") else io.BufferedReader(cast(Any, raw)))
            mark = next((m for m in _WIDE_MARKS if buffered.peek(4).startswith(m)), b"")
            if mark:
                yield _Recoded(buffered, "utf-32" if len(mark) == 4 else "utf-16")
            elif _WIDE.match(encoding):
                yield _Recoded(buffered, encoding)
            else:
                yield buffered

    def _named_encoding(self, encoding: str) -> str:
        """The encoding to read with: the one asked for, and for UTF-8 the one that the bytes are in, if it is gb18030."""
        try:
            name = codecs.lookup(encoding).name
        except LookupError as error:
            raise ConfigError(f"source {self.label}: sources.encoding={encoding!r} is unknown; for example gb18030") from error
        if name != "utf-8":
            return encoding
        found = self._detected
        if found is None:
            others = ", ".join(likely_encodings(self._sample())) or "none of the common ones"
            raise ConfigError(
                f"source {self.label}: the text is not UTF-8, nor clearly gb18030, so it would be read wrong. "
                f"Save it as UTF-8, or set `encoding:` of this source. It can be decoded as: {others}."
            )
        return found

    @property
    def _detected(self) -> str | None:
        return _detected_encoding(self) if self.entry is None else text_encoding(self._sample())

    def _sample(self) -> bytes:
        with named_damage(self.label), self._open_bytes() as raw:
            return raw.read(SAMPLE_BYTES)

    @contextmanager
    def _open_bytes(self) -> Iterator[IO[bytes]]:
        if self.entry is not None:
            tar, info = self.entry
            yield cast(IO[bytes], tar.extractfile(info))
            return
        if self.member is not None:
            with open_zip(self.path, self.inside) as archive, archive.open(self.member) as file:
                yield file
            return
        with open_compressed(self.path) as file:
            yield file

    @contextmanager
    def text(self, encoding: str = "utf-8") -> Iterator[io.TextIOWrapper]:
        """Text lines; a byte-order mark is skipped, undecodable bytes become U+FFFD (the import counts them)."""
        with self.open(encoding) as raw:
            name = "utf-8" if isinstance(raw, _Recoded) else self._named_encoding(encoding)
            yield io.TextIOWrapper(raw, encoding="utf-8-sig" if name == "utf-8" else name, errors="replace", newline="")

    def lines(self, encoding: str = "utf-8") -> Iterator[tuple[int, str | None]]:
        """(line number from 1, line) of the file or of its span; None: it is too long. Undecodable bytes become U+FFFD."""
        with self.open(encoding) as raw:
            encoding = "utf-8" if isinstance(raw, _Recoded) else self._named_encoding(encoding)
            first, end, before = self.span or (0, None, 0)
            if first:
                raw.seek(first)
            for number, line in bounded_lines(cast(Lines[bytes], raw), before + 1):
                text = None if line is None else line.decode(encoding, "replace")
                yield number, text.removeprefix("\ufeff") if number == 1 and text else text
                if end is not None and raw.tell() >= end:
                    return

    def text_lines(self, encoding: str, ledger: Ledger) -> Iterator[tuple[int, str]]:
        """(line number from 1, line) as text() gives them; a line that is too long is left out and counted."""
        with self.text(encoding) as text:
            for number, line in bounded_lines(cast(Lines[str], text)):
                if line is None:
                    ledger.change(f"line {TOO_LONG} left out", f"{self.label}:{number}")
                else:
                    yield number, line

    def whole(self) -> bytes:
        """All bytes of a file that must be in memory as a whole. Raises ConfigError for one of more than WHOLE_BYTES."""
        with self.open() as raw:
            data = raw.read(WHOLE_BYTES + 1)
        if len(data) > WHOLE_BYTES:
            raise ConfigError(f"source {self.label}: more than {WHOLE_BYTES >> 20} MB, which are read at once. Split it.")
        return data

    def spans(self, size: int) -> list[RawFile]:
        """The file as spans of about `size` bytes that several processes can read; itself where it cannot be cut."""
        if (
            self.member is not None
            or isinstance(self.path, RemotePath)
            or not self.path.is_file()
            or self.path.stat().st_size <= size
        ):
            return [self]
        if self.path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst"):
            return [self]
        with self.open() as start:
            if isinstance(start, _Recoded):  # its line ends cannot be found by bytes
                return [self]
        found: list[RawFile] = []
        first = lines = 0
        with self.path.open("rb") as raw:
            while piece := raw.read(size):
                piece += raw.readline()
                while len(piece) < 2 * size and (line := raw.readline(size)):  # an object may be printed over several lines
                    if line[:1] in (b"{", b"["):
                        raw.seek(-len(line), io.SEEK_CUR)
                        break
                    piece += line
                end = first + len(piece)
                found.append(replace(self, span=(first, end, lines)))
                first, lines = end, lines + piece.count(b"\n")
        return found

    def parts(self) -> list[RawFile]:
        """The files of a folder (or of a folder inside a zip), sorted; a plain file is its own only part."""
        if self.member is not None and self.member.endswith("/"):
            with open_zip(self.path, self.inside) as archive:
                return [RawFile(self.path, name, inside=self.inside) for name in archive.below(self.member)]
        if self.path.is_dir():
            found: list[Path | RemotePath] = [*self.path.iterdir()]
            found.sort(key=lambda path: path.name)
            return [RawFile(p) for p in found if p.is_file() and not p.name.startswith(".")]
        return [self]

    def sibling(self, name: str) -> RawFile | None:
        """The file of another name in the same folder."""
        if self.member is not None:
            return self._in_zip(f"{self.member.rpartition('/')[0]}/{name}".lstrip("/"))
        found = self.path.with_name(name)
        return RawFile(found) if found.is_file() else None

    def sibling_above(self, name: str) -> RawFile | None:
        """The file of that name beside this folder, or above the folder of this file."""
        if self.member is not None:
            folder = self.member.rstrip("/").rpartition("/")[0]
            folder = folder if self.member.endswith("/") else folder.rpartition("/")[0]
            return self._in_zip(f"{folder}/{name}".lstrip("/"))
        found = (self.path if self.path.is_dir() else self.path.parent).parent / name
        return RawFile(found) if found.is_file() else None

    @property
    def is_tar(self) -> bool:
        """A WebDataset shard of raw chats, or another tar."""
        return self.member is None and self.stem.lower().endswith(".tar")

    def members(self) -> Iterator[RawFile]:
        """The chats in a tar, KEY.json, KEY.jsonl and KEY.txt, in its order; any other file is its own only member.

        Only what the importers read of a member is in memory. Members of other kinds (pictures, __meta__) are passed over.
        """
        if not self.is_tar:
            yield self
            return
        if self.path.suffix.lower() != ".tar":
            raise ConfigError(f"source {self.label}: a compressed tar cannot be read from its middle. Unpack it to .tar first.")
        with open_tar(self.path) as tar:
            while (info := tar.next()) is not None:
                cast(Any, tar).members.clear()  # tarfile keeps every header
                if info.isfile() and info.name.lower().endswith(_TAR_CHATS) and not info.name.startswith("__"):
                    yield RawFile(self.path, info.name, folders=self.folders, entry=(tar, info))
            raw = cast(IO[bytes], tar.fileobj)
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # cut off between two members
                raise tarfile.ReadError("the end marker is missing")

    def _in_zip(self, member: str) -> RawFile | None:
        if self.entry is not None:
            return None
        with open_zip(self.path, self.inside) as archive:
            return RawFile(self.path, member, inside=self.inside) if member in archive else None

    def head(self, size: int = HEAD_BYTES) -> bytes:
        """The first bytes (of the first part of a folder), text as UTF-8."""
        first = self.parts()[0]
        if first is not self:
            return first.head(size)
        with self.open() as file:
            start = file.read(size)
        if isinstance(file, _Recoded) or start.isascii() or text_encoding(start) != "gb18030":
            return start
        return codecs.getincrementaldecoder("gb18030")("replace").decode(start).encode("utf-8", "replace")


def _readable(member: str) -> str:
    """The name of a zip's member. Chinese Windows writes GBK, which the format takes for code page 437: `╙δ└÷└÷` is 与丽丽."""
    try:
        raw = member.encode("cp437")
    except UnicodeError:
        return member
    if raw.isascii():
        return member
    found = text_encoding(raw)
    return raw.decode(found, "replace") if found in ("gb18030", "utf-8") else member


@lru_cache(maxsize=64)
def _encoding_of(file: RawFile, written_ns: int) -> str | None:
    return text_encoding(file._sample())


def _detected_encoding(file: RawFile) -> str | None:
    """As text_encoding, once per file and change of it: importers open a file several times."""
    written = file.path.stat().st_mtime_ns if isinstance(file.path, Path) else 0
    return _encoding_of(replace(file, span=None), written)


class _Recoded(io.BufferedReader):
    """A text of another encoding, read as UTF-8 without a mark; what cannot be decoded becomes U+FFFD."""

    def __init__(self, raw: IO[bytes], encoding: str) -> None:
        super().__init__(_Recoding(raw, encoding), 1 << 16)


class _Recoding(io.RawIOBase):
    def __init__(self, raw: IO[bytes], encoding: str) -> None:
        self.raw, self.decoder, self.left = raw, codecs.getincrementaldecoder(encoding)("replace"), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            piece = self.raw.read(1 << 16)
            # A surrogate without its other half is nothing that UTF-8 can say.
            self.left = self.decoder.decode(piece, final=not piece).encode("utf-8", "replace").removeprefix(codecs.BOM_UTF8)
            if not piece:
                break
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size
