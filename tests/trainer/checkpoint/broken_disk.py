"""A disk that fails: from the N-th operation on, whatever writes below a folder ends with an error of the system.

    with BrokenDisk(folder) as disk: command()                  # disk.operations: how many there were
    with BrokenDisk(folder, errno.ENOSPC, first=3): command()   # the third and all later ones fail
    with BrokenDisk(folder, KILL, first=3): command()           # the process is killed there

Operations: open for writing, make a folder, rename, fsync, and a file of tensors. Deleting works, as on a full disk. Lock files
are left out: Optuna waits half a minute for one that it cannot rename.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from chatmill.trainer.checkpoint import files as checkpoint_files

KILL = -1  # instead of an error: kill -9, and of what was to be synced only half is on the disk


def _die(path: str | os.PathLike[str]) -> None:
    if str(path).startswith("/proc/self/fd/") and Path(path).is_file():
        os.truncate(os.path.realpath(path), Path(path).stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


class BrokenDisk:
    """Patches functions of this process while it is entered. first: the operation that fails first, from 1; 0: none does."""

    def __init__(self, root: Path, code: int = 0, first: int = 0) -> None:
        self.root, self.code, self.first, self.operations = root.resolve(), code, first, 0
        self._real: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        self._patch(io, "open", lambda path, mode="r", *_, **__: path if set(mode) & set("wax+") else None)
        self._patch(builtins, "open", lambda path, mode="r", *_, **__: path if set(mode) & set("wax+") else None)
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        self._patch(os, "open", lambda path, flags, *_, **__: path if flags & writing else None)
        self._patch(os, "mkdir", lambda path, *_, **__: path)
        self._patch(os, "rename", lambda _, path, **__: path)
        self._patch(os, "replace", lambda _, path, **__: path)
        self._patch(os, "fsync", lambda handle: f"/proc/self/fd/{handle}", named=False)
        self._patch(checkpoint_files, "save_file", lambda _, path, **__: path)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, real in reversed(self._real):
            setattr(owner, name, real)

    def _patch(self, owner: Any, name: str, target: Callable[..., Any], named: bool = True) -> None:
        real = getattr(owner, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            path = target(*arguments, **options)
            place = Path(os.path.realpath(path)) if isinstance(path, str | os.PathLike) else Path()
            if place.is_relative_to(self.root) and ".lock" not in place.name:
                self.operations += 1
                if 0 < self.first <= self.operations:
                    if self.code == KILL:
                        _die(path)
                    raise OSError(self.code, os.strerror(self.code), *([os.fspath(path)] if named else []))
            return real(*arguments, **options)

        self._real.append((owner, name, real))
        setattr(owner, name, operation)
