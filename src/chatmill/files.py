"""Atomic and durable writes: a file or folder is old or new, never half-written, also on a full disk or after kill -9.

    replace_text(path, text)                    readers see the old text or the new one
    write_durably(path, data)                   the same, even after a power cut
    with beside(path) as file: file.write(...)  the same for what is written in pieces
    with folder_beside(place) as folder: ...; publish_folder(folder, place)
    read_unchanged(place, read)                 what read() finds in one folder, though writers exchange it meanwhile
    disk_problem(error)                         a full, read-only or failing disk in words

What a killed writer leaves has a hidden name. The next writer of the same place removes it: a writer holds a lock (flock) on
what it writes, which ends with its process. On a file system without such locks, one that is a day old and whose process number
is not in use here counts as left.
Standard library only: every part uses it, and login nodes have no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_LEFT_AFTER_S = 86_400.0
_READS = 50
_NUMBERS = itertools.count(1)
# What a manifest may call a file: one of its own folder. No path, no `pipe:` or URL, nothing hidden.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_DISK = {
    errno.ENOSPC: ("the disk is full", "Free some space and run it again."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space and run it again."),
    errno.EFBIG: ("a file may not grow this large", "Raise the limit (ulimit -f) or choose another file system."),
    errno.EROFS: ("the file system is read-only", "Choose another place, or have it mounted for writing."),
    errno.EIO: ("the disk reported an error (EIO)", "Look for its cause in the system's log (dmesg)."),
    errno.ESTALE: ("the network file system lost this file (ESTALE)", "Run it again."),
}


def is_plain_name(name: object) -> bool:
    """Whether a name can only be that of a file inside a folder."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def disk_problem(error: BaseException | None) -> str:
    """What a full, read-only or failing disk did to which file, and what helps; "" for every other error."""
    if not isinstance(error, OSError):
        return ""
    number = error.errno
    if number is None and (inside := re.search(r"\[Errno (\d+)\]", str(error))):  # shutil.copytree gathers errors as text
        number = int(inside[1])
    if number not in _DISK:
        return ""
    what, advice = _DISK[number]
    return f"{error.filename2 or error.filename or 'a file could not be written'}: {what}. {advice}"


# ---------------------------------------------------------------- files


def replace_text(path: Path, text: str) -> None:
    """Write beside the file and rename. If two processes do so at once, one of the two texts remains. Raises OSError."""
    replace_texts({path: text})


def replace_texts(texts: Mapping[Path, str]) -> None:
    """replace_text for files that belong together: none gets its name before all are written."""
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            file = stack.enter_context(beside(path))
            with naming(path):
                file.write(text.encode())
                _flush(file)


def write_durably(path: Path, data: bytes) -> None:
    """Write beside the file, fsync, rename: the file is absent, old or complete. Raises OSError."""
    with beside(path) as file:
        file.write(data)
    sync(path.parent)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, which is synced and gets its name when the block ends, and is removed after an error."""
    with naming(path):
        temporary, file = _open_beside(path)
        try:
            yield file
            _flush(file)
            temporary.replace(path)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename == str(temporary):
                error.filename, error.filename2 = str(path), None
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            with contextlib.suppress(OSError):  # of an error that was raised already
                file.close()


def _open_beside(path: Path) -> tuple[Path, BinaryIO]:
    """`.NAME.writing`, which a killed writer may have left; where it is in use, or not ours, one of our own."""
    shared = path.with_name(f".{path.name}.writing")
    with contextlib.suppress(PermissionError):
        file = os.fdopen(os.open(shared, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb")
        if _lock(file.fileno()) and _is_still(file.fileno(), shared):
            file.truncate(0)
            return shared, file
        file.close()
    _remove_left(path.parent, path.name, "writing")
    own = path.with_name(f".{path.name}.writing-{_own()}")
    file = own.open("wb")
    _lock(file.fileno())
    return own, file


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError of a write, which does not say where it happened."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


# ---------------------------------------------------------------- folders


@contextlib.contextmanager
def folder_beside(place: Path, shared: bool = False) -> Iterator[Path]:
    """A new hidden folder beside `place`, to fill and publish; removed after an error. Removes what dead writers left.

    shared: its name is shared_name(place), so that other processes write into it; the caller knows that no other writer lives.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if shared:
        _remove(shared_name(place))
    remove_leftovers(place.parent, place.name)
    folder, handle = _make_held(place, shared)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def shared_name(place: Path) -> Path:
    """The hidden folder into which several processes write what becomes `place`."""
    return place.with_name(f".{place.name}.writing-shared")


def _make_held(place: Path, shared: bool) -> tuple[Path, int]:
    for _ in range(1000):
        folder = shared_name(place) if shared else place.with_name(f".{place.name}.writing-{_own()}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        handle = _hold(folder)
        if handle is not None:
            return folder, handle
    raise FileExistsError(errno.EEXIST, "unfinished folders of this process are in the way", str(place))


def publish_folder(new: Path, place: Path) -> None:
    """Move the folder `new` to `place`, durably. What was there is removed, after the exchange."""
    sync(new)
    for attempt in range(1000):
        if _exchange(new, place):
            _remove(new)
            break
        if os.path.lexists(place):
            if attempt and _replace_in_two_steps(new, place):
                break
            continue  # it is there now: try the exchange once more
        try:
            new.replace(place)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another writer was faster: exchange with its folder
    else:
        raise FileExistsError(errno.EEXIST, "other writers publish to it all the time", str(place))
    sync(place.parent)


def _replace_in_two_steps(new: Path, place: Path) -> bool:
    """Without an atomic exchange: between the two renames the place is empty, never half full. False: another was faster."""
    handle = _hold(place)  # so that nobody takes it for a dead writer's
    old = place.with_name(f".{place.name}.retired-{_own()}")
    _remove(old)
    try:
        place.replace(old)
        try:
            new.replace(place)
        except OSError:
            if not os.path.lexists(place):
                with contextlib.suppress(OSError):  # else another writer was faster
                    old.replace(place)
            if os.path.lexists(place):
                _remove(old)
            raise
        _remove(old)  # `new` is published, wherever another writer may have moved it by now
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
        return False
    finally:
        if handle is not None:
            os.close(handle)
    return True


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Remove what killed writers left in `parent`, of the folder called `name` or of all.

    Without an atomic exchange a writer may have died while its place was empty: the old folder is then put back.
    """
    for found in _left(parent, name, "retired"):
        place = parent / found.name[1:].rpartition(".retired-")[0]
        with _abandoned(found) as alone:
            if alone and not os.path.lexists(place):
                try:
                    found.replace(place)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                        raise  # else another writer was faster
            if alone and os.path.lexists(place):
                _remove(found)
    _remove_left(parent, name, "writing")


def read_unchanged(folder: Path, read: Callable[[], T]) -> T:
    """read(), which opens files of the folder; once more where the folder was exchanged meanwhile, so that all are of one."""
    for _ in range(_READS):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)  # while it is open, no other folder gets its inode
        except OSError:
            read()  # says in its own words what is wrong; where the folder is there by now, nothing vouches for what was read
            continue
        try:
            found = read()
        except Exception:
            if _is_still(handle, folder):
                raise
        else:
            if _is_still(handle, folder):
                return found
        finally:
            os.close(handle)
    raise FileExistsError(errno.EEXIST, "the folder is exchanged all the time; try again later", str(folder))


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step where the system can (Linux renameat2)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _remove(path: Path) -> None:
    """Remove a folder, or a link: what that points to is somebody else's. What cannot go now, the next writer removes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# ---------------------------------------------------------------- who is still writing


def _own() -> str:
    """A name that is used once: whoever removes an old folder by its name must not meet a new one there."""
    return f"{os.getpid()}.{next(_NUMBERS)}"


def _left(parent: Path, name: str | None, kind: str) -> list[Path]:
    return list(parent.glob(f".{'*' if name is None else glob.escape(name)}.{kind}-*"))


def _remove_left(parent: Path, name: str | None, kind: str) -> None:
    for found in _left(parent, name, kind):
        with _abandoned(found) as alone:
            if alone:
                _remove(found)


@contextlib.contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether the writer of a file or folder is gone; if so, nobody else removes it meanwhile."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        yield error.errno == errno.ELOOP  # a link that was exchanged with a new folder
        return
    try:
        locked = _lock(handle)
        yield _is_still(handle, path) and (_is_old(path) if locked is None else locked)
    finally:
        os.close(handle)


def _hold(path: Path) -> int | None:
    """A descriptor of a folder, with its lock where the file system has locks; None where it is another's, or gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if _lock(handle) is False or not _is_still(handle, path):
        os.close(handle)
        return None
    return handle


def _lock(handle: int) -> bool | None:
    """Lock what is open, without waiting; False where another holder has it, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_still(handle: int, path: Path) -> bool:
    """Whether the path still names what is open."""
    try:
        found, held = path.stat(), os.fstat(handle)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _is_old(path: Path) -> bool:
    """Without locks: whether it is a day old and the process in its name is not running here."""
    number = re.search(r"-(\d+)(\.\d+)?$", path.name)
    with contextlib.suppress(OSError):
        if time.time() - path.lstat().st_mtime > _LEFT_AFTER_S:
            return number is None or not Path(f"/proc/{number[1]}").exists()
    return False


# ---------------------------------------------------------------- the rest


def sync(path: Path) -> None:
    """fsync a file or folder. Syncing a folder makes the renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
