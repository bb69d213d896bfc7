"""What a launch keeps of the checkout: the code that runs, and nothing that merely lies beside it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from chatmill.launcher.jobs import snapshot
from chatmill.launcher.jobs.snapshot import Snapshot, snapshot_code

CODE = [
    "data/pairs.py",
    "kernels/tuning/a.json",
    "launcher/train.sh",
    "pyproject.toml",
    "slurm/train.sh",
    "src/chatmill/py.typed",
    "trainer/new.py",
    "trainer/recipes/tiny.yaml",
]
PRIVATE = (
    "data/chats.jsonl",
    "data/my export.txt",
    "trainer/.env",
    "launcher/cluster.pem",
    "kernels/id_rsa",
    "slurm/my.yaml",
    "data/k.json",
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small git checkout in the project's layout, with a change, a new module, private files, and a tracked key."""
    root = tmp_path / "checkout"
    tracked = {name: "" for name in CODE if name not in ("trainer/new.py", "launcher/train.sh")}
    tracked |= {"data/pairs.py": "a = 1\n", "data/.env.local": "KEY=hunter2\n", "README.md": "not a part"}
    for name, text in tracked.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "launcher").mkdir()
    (root / "launcher/train.sh").symlink_to("../slurm/train.sh")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    (root / "data/pairs.py").write_text("a = 2\n")
    (root / "data/.env.local").write_text("KEY=hunter3\n")
    (root / "trainer/new.py").write_text("b = 1\n")
    for name in PRIVATE:
        (root / name).write_text("private")
    monkeypatch.setattr(snapshot, "code_root", lambda: root)
    return root


def names_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def take(tmp_path: Path) -> Snapshot:
    (tmp_path / "launch").mkdir()
    return snapshot_code(tmp_path / "launch")


def test_tracked_files_and_new_code_are_taken_and_private_files_are_named_and_left(checkout: Path, tmp_path: Path) -> None:
    taken = take(tmp_path)
    assert names_under(taken.folder) == list(taken.copied) == CODE
    assert (taken.folder / "data/pairs.py").read_text() == "a = 2\n"
    assert taken.new == ("trainer/new.py",)
    assert set(taken.left_out) == {*PRIVATE, "data/.env.local"}
    diff = (tmp_path / "launch" / "uncommitted.diff").read_text()
    assert "+a = 2" in diff and "hunter" not in diff
    said = str(taken)
    assert (
        "8 files copied" in said
        and "1 of them not in git: trainer/new.py" in said
        and "data/chats.jsonl" in said
        and "3 more" in said
    )


def test_a_checkout_without_git_gives_its_code_and_what_the_code_reads(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".git").rename(tmp_path / "gone")
    (checkout / "slurm/my.yaml").unlink()
    taken = take(tmp_path)
    assert names_under(taken.folder) == CODE
    assert "data/chats.jsonl" in taken.left_out
