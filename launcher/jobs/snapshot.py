"""The code and the recipe of a launch, kept in the run folder: what ran can be read, diffed and run again.

RUN/launches/001/{code/, config.yaml, job.json, job.sh, uncommitted.diff, commit}

Of a git checkout, the files that git tracks are copied as they are now, and new ones only where their suffix is that of code:
a chat or a key that lies beside the code stays there. An installed package is copied unchanged. A job that waits in a queue for
days runs this copy, not the checkout as it is by then.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import chatmill
from chatmill.files import replace_text
from chatmill.formatting import counted

from ..programs import output_of

PARTS = ("data", "kernels", "trainer", "launcher", "src", "slurm", "pyproject.toml")
LARGEST_FILE_BYTES = 4 << 20
CODE_SUFFIXES = {".py", ".pyi", ".sh", ".cu", ".cuh", ".cpp", ".h", ".html", ".css", ".js"}
READ_BY_CODE = ("recipes/*.yaml", "tuning/*.json", "slurm/*.yaml", "pyproject.toml", "py.typed")  # needed where git cannot tell
SECRET_FILE = re.compile(r"\.env(\..*)?|\.netrc|id_[a-z0-9]+|.*\.(pem|key|p12|pfx|keystore)", re.IGNORECASE)


def code_root() -> Path | None:
    """The checkout this package runs from, or None when it is an installed wheel."""
    root = Path(chatmill.__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "chatmill").is_dir() else None


@contextlib.contextmanager
def new_launch(run_dir: Path) -> Iterator[Path]:
    """The next folder RUN/launches/NNN, to be filled; gone again where the disk does not take it."""
    folder = _next_launch(run_dir)
    try:
        yield folder
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _next_launch(run_dir: Path) -> Path:
    folder = run_dir / "launches"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(list(folder.iterdir())) + 1, 10_000):
        try:
            (folder / f"{number:03d}").mkdir()
        except FileExistsError:
            continue
        return folder / f"{number:03d}"
    raise OSError(f"{folder} is full")


@dataclass(frozen=True)
class Snapshot:
    """folder: the copy (its src/ goes on PYTHONPATH). copied, new, left_out: names relative to the checkout.

    new: those of `copied` that git does not track. left_out: untracked files that are not code, keys, and very large files.
    """

    folder: Path
    copied: tuple[str, ...]
    new: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What was taken, in one or two lines."""
        lines = [f"code        {counted(len(self.copied), 'file')} copied to {self.folder}"]
        if self.new:
            lines[0] += f", {len(self.new)} of them not in git: {_some(self.new)}"
        if self.left_out:
            lines.append(f"            left out, because they are not code: {_some(self.left_out)}")
        return "\n".join(lines)


def snapshot_code(launch: Path) -> Snapshot:
    """Copy the code to launch/code."""
    target = launch / "code"
    root = code_root()
    if root is None:
        package = Path(chatmill.__file__).resolve().parent
        shutil.copytree(package, target / "src" / "chatmill", ignore=shutil.ignore_patterns("__pycache__"))
        return Snapshot(target, tuple(sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())))
    tracked, untracked = _files(root)
    new = [name for name in untracked if Path(name).suffix in CODE_SUFFIXES]
    copied, left_out = [], [name for name in untracked if Path(name).suffix not in CODE_SUFFIXES]
    for name in sorted({*tracked, *new}):
        source, copy = root / name, target / name
        if not source.is_symlink() and not source.is_file():
            continue  # deleted and not committed
        if SECRET_FILE.fullmatch(source.name) or source.lstat().st_size > LARGEST_FILE_BYTES:
            left_out.append(name)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(source.readlink())
        else:
            shutil.copy2(source, copy)
        copied.append(name)
    git = ("git", "-C", str(root))
    hidden = [f":(exclude,literal){name}" for name in left_out]
    commit, diff = output_of([*git, "rev-parse", "HEAD"]), output_of([*git, "diff", "HEAD", "--", *PARTS, *hidden])
    if commit:
        replace_text(launch / "commit", commit)
    if diff:
        replace_text(launch / "uncommitted.diff", diff)
    taken = set(copied)
    return Snapshot(target, tuple(copied), tuple(name for name in new if name in taken), tuple(sorted(left_out)))


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _files(root: Path) -> tuple[list[str], list[str]]:
    """What git tracks and what it neither tracks nor ignores. Without git: the package's own kinds of files, as tracked."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--exclude-standard"]
    tracked = output_of([*git, "--cached", "--", *PARTS])
    if tracked:
        others = output_of([*git, "--others", "--", *PARTS]) or ""
        return [name for name in tracked.split("\0") if name], [name for name in others.split("\0") if name]
    paths = [path for part in PARTS for path in (root / part, *(root / part).rglob("*")) if path.is_symlink() or path.is_file()]
    names = [path.relative_to(root) for path in paths]
    shown = [str(name) for name in names if not any(word.startswith(".") or word == "__pycache__" for word in name.parts)]
    code = [
        name
        for name in shown
        if Path(name).suffix in CODE_SUFFIXES or any(map(Path(name).match, READ_BY_CODE)) or (root / name).is_symlink()
    ]
    return sorted(code), sorted(set(shown) - set(code))
