"""Intermediate files of a build, in `.<name>.work-<digest>` beside the data set, one build at a time."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.files import remove_leftovers, write_durably

from ..raw.files import RawFile
from ..recipe import DataRecipe


@dataclass(frozen=True)
class WorkFolder:
    """A build in progress: its recipe, its raw files (source number, file) and the folder of intermediate files."""

    folder: Path
    recipe: DataRecipe
    files: tuple[tuple[int, RawFile], ...] = ()

    def path(self, stage: str, name: str) -> Path:
        """File of a stage."""
        return self.folder / stage / name

    def benchmarks(self) -> NDArray[np.uint64] | None:
        """Hashes of the evaluation sets to keep out, if there are any."""
        if not self.recipe.dedup.decontaminate:
            return None
        return load_arrays(self.path("prepare", "benchmarks.npz"))["hashes"]


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """npz, durably."""
    buffer = BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_durably(path, buffer.getvalue())


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Inverse of save_arrays."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def remove_work(folder: Path) -> None:
    """Remove the work folders. Each is renamed first: a later build must not continue from one that is half removed.

    What a failing disk does not let go stays for the next build: the data set is finished.
    """
    with contextlib.suppress(OSError):
        for stale in folder.parent.glob(f".{folder.name}.work-*"):
            stale.rename(Path(tempfile.mkdtemp(prefix=f".{folder.name}.gone-", dir=folder.parent)) / stale.name)
    for gone in folder.parent.glob(f".{folder.name}.gone-*"):
        shutil.rmtree(gone, ignore_errors=True)


def remove_rest(folder: Path, *, is_staged: bool) -> None:
    """What a build leaves that was killed after it had published, unless another build is at work here.

    is_staged: the data set was published at a URL, so that the folder is only its copy.
    """
    if not (is_staged and folder.is_dir()) and not any(folder.parent.glob(f".{folder.name}.*-*")):
        return
    with contextlib.suppress(ConfigError), build_lock(folder):
        remove_leftovers(folder.parent, folder.name)
        remove_work(folder)
        if is_staged:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """One build of a folder at a time.

    A record lock, which worker processes do not inherit: one that is still dying in a disk write after `kill -9` of the whole
    group would otherwise hold it against the next build.
    """
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"data set {folder}: another build of it is running") from error
        yield
