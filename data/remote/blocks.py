"""Remote token shards: blocks are read by range and kept in a local cache; everything else is as with local shards.

    dataset = RemoteDataset.open("https://host/corpora/chat", "train", cache="/local/cache", limit_bytes=200 << 30)
    PackedStream(dataset, ...)

URLs: http(s) by range requests; paths and file://; other schemes (s3://, gs://, hf:// ...) through fsspec, if it and the
scheme's own package are installed. Every block is checked against the hash in the index. Threads fetch the blocks of the
current and the next window ahead, so that the training step does not wait for the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from chatmill.config import ConfigError

from ..shards.dataset import TokenDataset
from ..shards.index import ShardIndex, block_hash
from ..shards.manifest import MANIFEST, fingerprints, parse_manifest
from ..shards.quarantine import QUARANTINE, parse_quarantine
from .cache import PieceCache, with_retries
from .files import filesystem

TIMEOUT_S = 60


class RangeReader(Protocol):
    """Bytes [start, start + size) of a file below the root; all of it if size is None. Raises OSError."""

    def __call__(self, name: str, start: int = 0, size: int | None = None) -> bytes: ...


def range_reader(url: str) -> RangeReader:
    """A reader for the files below a URL or path."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return _local_reader(Path(rest if separator else url))
    return _http_reader(url) if scheme in ("http", "https") else _fsspec_reader(url)


def _local_reader(root: Path) -> RangeReader:
    def read(name: str, start: int = 0, size: int | None = None) -> bytes:
        with (root / name).open("rb") as file:
            file.seek(start)
            return file.read() if size is None else file.read(size)

    return read


def _http_reader(root: str) -> RangeReader:
    def read(name: str, start: int = 0, size: int | None = None) -> bytes:
        request = urllib.request.Request(f"{root.rstrip('/')}/{name}")
        if size is not None:
            request.add_header("Range", f"bytes={start}-{start + size - 1}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                data: bytes = response.read()
                # A server without ranges answers 200 with the whole file.
                return data[start : start + size] if size is not None and response.status == 200 else data
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404, 410):
                raise FileNotFoundError(f"{request.full_url}: HTTP {error.code} {error.reason}") from error
            raise
        except HTTPException as error:  # cut off in the middle
            raise OSError(f"{request.full_url}: {type(error).__name__} {error}") from error

    return read


def _fsspec_reader(root: str) -> RangeReader:
    files, path = filesystem(root)

    def read(name: str, start: int = 0, size: int | None = None) -> bytes:
        try:
            data: bytes = files.cat_file(f"{path}/{name}", start=start, end=None if size is None else start + size)
        except OSError:
            raise
        except Exception as error:  # a store's own errors: no connection, no credentials
            raise OSError(f"{root}/{name}: {type(error).__name__}: {error}") from error
        return data

    return read


class RemoteDataset(TokenDataset):
    """`TokenDataset` over a URL. Opening reads the manifest and, through the cache, the indices."""

    url: str
    _cache: PieceCache
    _read: RangeReader
    _threads: int
    _pool: ThreadPoolExecutor | None
    _pool_process: int
    _coming: dict[int, Future[bytes]]  # blocks on their way into the cache

    @classmethod
    def open(  # type: ignore[override]
        cls,
        path: str,
        split: str,
        *,
        cache: str | Path,
        limit_bytes: int = 100 << 30,
        threads: int = 8,
        attempts: int = 5,
        damaged_blocks: float = 0.0,
    ) -> RemoteDataset:
        """Open one split below a URL. Raises ConfigError, or RemoteReadError where every attempt failed."""
        read = range_reader(path)
        store = PieceCache(cache, limit_bytes, attempts=attempts)
        name = f"{path.rstrip('/')}/{MANIFEST}"
        try:
            raw = with_retries(lambda: read(MANIFEST), _is_json, name, attempts=attempts)
        except OSError as error:
            raise ConfigError(f"data set {path}: {MANIFEST} cannot be read ({error}).\nGive the folder's URL.") from error
        manifest = parse_manifest(raw, name)
        if split not in manifest["splits"]:
            raise ConfigError(f"data set {path}: no split {split!r}; it has {', '.join(manifest['splits'])}")
        indices = []
        for record in manifest["splits"][split]["shards"]:
            file, digest = f"{split}/{record['index']}", record["index_sha256"]
            data = store.get(f"{file} {digest}", _fetcher(read, file), partial(_has_sha256, digest))
            indices.append(ShardIndex.from_bytes(data, f"{path}/{file}"))
        dataset = cls(Path(path), split, manifest, indices)
        dataset.url, dataset._cache, dataset._read, dataset._threads = path, store, read, threads
        dataset._pool, dataset._pool_process, dataset._coming = None, 0, {}
        try:
            listed = with_retries(lambda: read(QUARANTINE), _is_json, f"{path}/{QUARANTINE}", attempts=attempts)
        except FileNotFoundError:
            return dataset
        held = parse_quarantine(listed, f"{path}/{QUARANTINE}", fingerprints(manifest)).get(split, ())
        dataset.hold(held, damaged_blocks)
        return dataset

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_pool": None, "_coming": {}}

    def block_name(self, b: int) -> str:
        """The name of block b in errors."""
        return f"{self.url}, block {b}"

    def block_bytes(self, b: int) -> bytes:
        """The bytes of block b, from the cache or by one range request, fetched again until the hash matches."""
        coming = self._coming.get(b) if self._pool_process == os.getpid() else None
        if coming is not None:
            wait([coming])
        return self._cached(b)

    def will_read(self, blocks: Iterable[int]) -> None:
        """Start fetching blocks that will be read into the cache."""
        if self._pool is None or self._pool_process != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="chatmill-fetch")
            self._pool_process, self._coming = os.getpid(), {}
        for b in blocks:
            if b not in self._coming:
                coming = self._coming[b] = self._pool.submit(self._cached, b)
                coming.add_done_callback(lambda _, b=b: self._coming.pop(b, None))  # type: ignore[misc]

    def close(self) -> None:
        """Stop the fetching threads."""
        pool, self._pool, self._coming = getattr(self, "_pool", None), None, {}
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _cached(self, b: int) -> bytes:
        place = self.block_place(b)
        record = self.manifest["splits"][self.split]["shards"][place.shard]
        return self._cache.get(
            f"{self.split}/{record['name']} {record['sha256']} {place.offset}+{place.size}",
            _fetcher(self._read, f"{self.split}/{record['name']}", place.offset, place.size),
            lambda data: len(data) == place.size and block_hash(data) == place.xxh3,
        )


def _fetcher(read: RangeReader, name: str, start: int = 0, size: int | None = None) -> Callable[[], bytes]:
    return lambda: read(name, start, size)


def _has_sha256(digest: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == digest


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False
