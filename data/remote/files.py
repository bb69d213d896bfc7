"""Files that lie elsewhere (s3, gs, hf, http ...), through fsspec: raw inputs read in place, finished data sets published.

    RemotePath("s3://bucket/raw/a.jsonl.gz").open()       find_remote("s3://bucket/raw/*.jsonl.gz")
    publish_remotely(Path("corpora/chat"), "s3://bucket/sets/chat")
    with local_copy("s3://bucket/sets/chat") as folder: ...

A published data set has its manifest last: a reader sees all of it or none of it, and never an old manifest beside new shards.
Credentials and endpoints are fsspec's own business (for s3: ~/.aws, AWS_* variables).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

from chatmill.config import ConfigError
from chatmill.files import sha256_file

MANIFEST = "manifest.json"
READ_AHEAD = 8 << 20  # bytes per request
INSTALL = {
    "s3": "pip install 'chatmill[s3]'",
    "gs": "pip install gcsfs",
    "hf": "pip install huggingface_hub",
    "http": "pip install aiohttp",
    "https": "pip install aiohttp",
}


def is_url(place: str | Path) -> bool:
    """Is it a URL of a store rather than a path of this machine?"""
    return "://" in str(place)


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL; ConfigError where its package is missing."""
    scheme = url.partition("://")[0]
    try:
        found: tuple[Any, str] = importlib.import_module("fsspec.core").url_to_fs(url)
    except ImportError as error:
        how = INSTALL.get(scheme)
        raise ConfigError(
            f"{url}: {scheme}:// needs another package ({error})." + (f" Install it: {how}" if how else "")
        ) from error
    except ValueError as error:
        raise ConfigError(f"{url}: cannot read this kind of URL ({error})") from error
    return found


@dataclass(frozen=True, order=True, slots=True)
class RemotePath:
    """As much of `pathlib.Path` as reading raw files takes. Holds the URL alone, so that it can go to other processes."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the URL, without a query."""
        return self.url.rstrip("/").rpartition("/")[2].partition("?")[0]

    @property
    def suffix(self) -> str:
        """`.gz` of `a.jsonl.gz`."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder it is in."""
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def with_name(self, name: str) -> RemotePath:
        """Another file of the same folder."""
        return self.parent / name

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The bytes, READ_AHEAD at a time."""
        files, path = filesystem(self.url)
        # Many web servers do not know ranges, so read from the beginning. Archives need seeks: a zip has its index at the end.
        streamed = self.url.startswith("http") and self.suffix.lower() not in (".zip", ".tar")
        raw: IO[bytes] = files.open(path, mode, block_size=0 if streamed else READ_AHEAD)
        return io.BufferedReader(raw, 1 << 20) if hasattr(raw, "readinto") else raw

    def sha256(self) -> str:
        """Hex sha256 of the bytes, streamed."""
        digest = hashlib.sha256()
        with self.open() as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()

    def stat(self) -> SimpleNamespace:
        """st_size in bytes."""
        files, path = filesystem(self.url)
        return SimpleNamespace(st_size=int(files.size(path) or 0))

    def is_file(self) -> bool:
        """Does it exist as a file?"""
        files, path = filesystem(self.url)
        return bool(files.isfile(path))

    def is_dir(self) -> bool:
        """Is it the beginning of other names?"""
        files, path = filesystem(self.url)
        return bool(not self.url.startswith("http") and files.isdir(path))

    def iterdir(self) -> Iterator[RemotePath]:
        """What is directly in the folder."""
        files, path = filesystem(self.url)
        return (RemotePath(files.unstrip_protocol(found)) for found in files.ls(path, detail=False))


def find_remote(pattern: str) -> list[RemotePath]:
    """Files named by a URL, a folder's URL (all files below it) or a glob, sorted."""
    files, path = filesystem(pattern)
    try:
        if any(c in path for c in "*[") or ("?" in path and not pattern.startswith("http")):
            found = files.glob(path)
        elif pattern.startswith("http"):
            return [RemotePath(pattern)] if files.exists(path) else []
        else:
            found = files.find(path)  # of a file: itself
    except FileNotFoundError:
        return []
    except Exception as error:  # each store has errors of its own, for credentials above all
        raise ConfigError(f"source {pattern!r}: cannot be listed: {type(error).__name__}: {error}") from error
    paths = [RemotePath(files.unstrip_protocol(name)) for name in sorted(found)]
    return [p for p in paths if not p.name.startswith(".") and not p.is_dir()]


def staging_folder(url: str) -> Path:
    """Where a data set is built before it goes to a URL. Not in a temporary folder: an interrupted build continues here."""
    return Path("corpora/.remote") / f"{RemotePath(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def read_remote_json(url: str, name: str) -> dict[str, Any] | None:
    """A JSON file below a URL; None where there is none."""
    files, root = filesystem(url)
    try:
        found = json.loads(files.cat_file(f"{root}/{name}"))
    except (FileNotFoundError, ValueError):
        return None
    except Exception as error:
        raise ConfigError(f"{url}/{name}: cannot be read: {type(error).__name__}: {error}") from error
    return found if isinstance(found, dict) else None


def remote_files(url: str) -> dict[str, int]:
    """Size in bytes of every file below a URL, by its name relative to it."""
    files, root = filesystem(url)
    files.invalidate_cache()
    root = root.rstrip("/")
    found = files.find(root, detail=True)
    return {name[len(root) :].lstrip("/"): int(info["size"]) for name, info in found.items() if name != root}


def publish_remotely(folder: Path, url: str, tick: Callable[[int, int], None] | None = None) -> None:
    """Copy a finished data set to a URL: the old manifest goes, files come, what is left over goes, the new manifest comes.

    What a killed attempt for the same manifest has copied is not copied again.
    """
    files, root = filesystem(url)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    log = folder.with_name(f".{folder.name}.copied")
    identity = sha256_file(folder / MANIFEST)
    copied = log.read_text(encoding="utf-8").split("\n") if log.is_file() else []
    try:
        there = remote_files(url)
        if MANIFEST in there:
            files.rm_file(f"{root}/{MANIFEST}")
        if copied[:1] != [identity]:
            copied = [identity]
            log.write_text(identity + "\n", encoding="utf-8")
        done = set(copied[1:])
        with log.open("a", encoding="utf-8") as record:
            for number, name in enumerate(names, 1):
                if name not in done or there.get(name) != (folder / name).stat().st_size:
                    files.put_file(str(folder / name), f"{root}/{name}")
                    record.write(name + "\n")
                    record.flush()
                if tick:
                    tick(number, len(names))
        for stranger in set(there) - {*names, MANIFEST}:
            files.rm_file(f"{root}/{stranger}")
        sizes = {name: (folder / name).stat().st_size for name in names}
        if (arrived := remote_files(url)) != sizes:
            wrong = sorted(name for name in {*arrived, *sizes} if arrived.get(name) != sizes.get(name))
            raise OSError(f"{wrong[0]} has {arrived.get(wrong[0])} bytes there, {sizes.get(wrong[0])} here")
        files.pipe_file(f"{root}/{MANIFEST}", (folder / MANIFEST).read_bytes())
    except (NotImplementedError, OSError) as error:
        raise ConfigError(
            f"{url}: cannot be written ({type(error).__name__}: {error}).\nThe finished data set is in {folder}; "
            "the same command continues the copy."
        ) from error
    log.unlink()


@contextlib.contextmanager
def local_copy(url: str, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """A temporary folder with the files below a URL whose relative names are wanted."""
    try:
        sizes = {name: size for name, size in remote_files(url).items() if wanted(name)}
    except FileNotFoundError:
        sizes = {}
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"data set {url}: cannot be listed: {type(error).__name__}: {error}") from error
    if not sizes:
        raise ConfigError(f"data set {url}: nothing is there. Give the folder's URL.")
    files, root = filesystem(url)
    with tempfile.TemporaryDirectory(prefix="chatmill-") as text:
        folder = Path(text)
        free = shutil.disk_usage(folder).free
        if sum(sizes.values()) > free:
            raise ConfigError(f"data set {url}: {sum(sizes.values()):,} bytes, {free:,} free in {folder.parent}. Set TMPDIR.")
        for name in sizes:
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
                raise ConfigError(f"data set {url}: {name!r} leads outside its folder")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.get_file(f"{root}/{name}", str(folder / name))
        yield folder
