"""The code and the recipe of a launch, kept in the run folder: what ran can be read, diffed and run again.

RUN/launches/001/{code/, config.yaml, job.json, job.sh, uncommitted.diff, commit}

A git checkout is copied file by file as git sees it (with uncommitted and new files, without ignored ones); an installed
package is copied unchanged. A job that waits in a queue for days runs this copy, not the checkout as it is by then.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import chatmill

from ..programs import output_of

PARTS = ("data", "kernels", "trainer", "launcher", "src", "slurm", "pyproject.toml")
LARGEST_FILE_BYTES = 4 << 20


def code_root() -> Path | None:
    """The checkout this package runs from, or None when it is an installed wheel."""
    root = Path(chatmill.__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "chatmill").is_dir() else None


def new_launch(run_dir: Path) -> Path:
    """Make and return the next folder RUN/launches/NNN."""
    folder = run_dir / "launches"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(list(folder.iterdir())) + 1, 10_000):
        try:
            (folder / f"{number:03d}").mkdir()
        except FileExistsError:
            continue
        return folder / f"{number:03d}"
    raise OSError(f"{folder} is full")


def snapshot_code(launch: Path) -> Path:
    """Copy the code to launch/code (its src/ goes on PYTHONPATH); returns that folder."""
    target = launch / "code"
    root = code_root()
    if root is None:
        package = Path(chatmill.__file__).resolve().parent
        shutil.copytree(package, target / "src" / "chatmill", ignore=shutil.ignore_patterns("__pycache__"))
        return target
    for name in _files(root):
        source, copy = root / name, target / name
        if source.is_symlink():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(source.readlink())
        elif source.is_file() and source.stat().st_size <= LARGEST_FILE_BYTES:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    git = ("git", "-C", str(root))
    commit, diff = output_of([*git, "rev-parse", "HEAD"]), output_of([*git, "diff", "HEAD", "--", *PARTS])
    if commit:
        (launch / "commit").write_text(commit, encoding="utf-8")
    if diff:
        (launch / "uncommitted.diff").write_text(diff, encoding="utf-8")
    return target


def _files(root: Path) -> list[str]:
    shown = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    listed = output_of(["git", "-C", str(root), *shown])
    if listed:
        return sorted({name for name in listed.split("\0") if name})
    paths = [path for part in PARTS for path in (root / part, *(root / part).rglob("*")) if path.is_symlink() or path.is_file()]
    names = [path.relative_to(root) for path in paths if path.suffix != ".pyc"]
    return sorted(str(name) for name in names if not any(word.startswith(".") for word in name.parts))
