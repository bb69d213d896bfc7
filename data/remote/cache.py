"""A cache of pieces of remote files on the local disk: bounded, shared by all processes of a machine, only complete pieces.

    cache = PieceCache("/local/cache", limit_bytes=200 << 30)
    data = cache.get(key, fetch=lambda: read_range(...), is_whole=lambda data: hash(data) == expected)

One process fetches a piece while the others that want it wait for its file lock. A piece is checked, written under another
name and renamed; every reader checks it again, so a damaged file is fetched again rather than used. The least recently
used pieces go first when the limit is reached; the size is kept in one locked file: the limit holds for all processes together.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class RemoteReadError(OSError):
    """A remote piece could not be read, or never arrived complete."""


def with_retries(
    fetch: Callable[[], bytes],
    is_whole: Callable[[bytes], bool],
    what: str,
    *,
    attempts: int = 5,
    first_wait_s: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
) -> bytes:
    """fetch() until is_whole accepts the result. Waits first_wait_s, doubled each time and randomly shortened by up to half."""
    reason: object = "it came incomplete or damaged"
    for attempt in range(attempts):
        if attempt:
            # When a store is busy, many ranks fail together; they must not all retry at the same time.
            sleep(first_wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
        try:
            data = fetch()
        except FileNotFoundError:
            raise  # waiting does not help
        except OSError as error:
            reason = error
            continue
        if is_whole(data):
            return data
        reason = "it came incomplete or damaged"
    raise RemoteReadError(f"{what}: {attempts} attempts failed; the last: {reason}.")


class PieceCache:
    """Pieces by key below `folder`, together at most limit_bytes.

    A piece larger than the limit is passed through and not kept.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, *, attempts: int = 5, first_wait_s: float = 0.5) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self.attempts, self.first_wait_s = attempts, first_wait_s
        self.pieces = self.folder / "pieces"
        self.locks = self.folder / "locks"
        self.pieces.mkdir(parents=True, exist_ok=True)
        self.locks.mkdir(exist_ok=True)

    def get(self, key: str, fetch: Callable[[], bytes], is_whole: Callable[[bytes], bool]) -> bytes:
        """The piece `key`: from the disk, or fetched and kept. Raises RemoteReadError after the last attempt."""
        name = hashlib.sha256(key.encode()).hexdigest()
        path = self.pieces / name[:2] / name
        data = self._read(path, is_whole)
        if data is not None:
            return data
        with self._locked(f"piece-{name[:3]}"):
            data = self._read(path, is_whole)  # another process may have fetched it meanwhile
            if data is not None:
                return data
            data = with_retries(fetch, is_whole, key, attempts=self.attempts, first_wait_s=self.first_wait_s)
            if len(data) <= self.limit_bytes:
                self._keep(path, data)
        return data

    def size(self) -> int:
        """Bytes of all pieces, counted from the files."""
        return sum(size for _, size, _ in self._files())

    def _read(self, path: Path, is_whole: Callable[[bytes], bool]) -> bytes | None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if not is_whole(data):
            return None  # the next _keep replaces it
        with suppress(FileNotFoundError):  # evicted while being read: the open file stayed whole
            os.utime(path)  # it was used now
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with self._locked("size"):
            replaced = path.stat().st_size if path.exists() else 0
            used = self._recorded_size() - replaced + len(data)
            if used > self.limit_bytes:
                used = self._evict(self.limit_bytes * 9 // 10 - len(data)) + len(data)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            except OSError:  # a full disk must not end the training: the piece is simply not kept
                temporary.unlink(missing_ok=True)
                return
            (self.folder / "size").write_text(str(used))

    def _recorded_size(self) -> int:
        try:
            return int((self.folder / "size").read_text())
        except (FileNotFoundError, ValueError):
            return self.size()

    def _evict(self, target: int) -> int:
        """Remove the least recently used pieces until at most `target` bytes (or none) are left; returns what is left."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used <= max(0, target):
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        for path in self.pieces.glob("*/*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            if path.name.startswith(".") and time.time() - found.st_mtime > 3600:
                path.unlink(missing_ok=True)  # left by a process that died while writing
            elif not path.name.startswith("."):
                yield found.st_mtime_ns, found.st_size, path

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        descriptor = os.open(self.locks / name, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released by the kernel when the process dies
            yield
        finally:
            os.close(descriptor)
