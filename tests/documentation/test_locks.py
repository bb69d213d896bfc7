"""locks/: what `make venv` and `make venv-dev` install, each package with its version and the hashes of its files."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .documented import ROOT

LOCKS = {path.stem: path for path in (ROOT / "locks").glob("*.txt") if path.stem != "left-out"}
LEFT_OUT = {"torch"}  # of what pyproject.toml names; which build it is differs from machine to machine
PINNED = re.compile(r"([a-z0-9-]+)==([\w.]+)(?: ; (.+?))? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?")


def entries(name: str) -> list[tuple[str, str, int]]:
    """(package, version, number of hashes) of a lock. Raises AssertionError for a line that is none of these."""
    found: list[tuple[str, str, int]] = []
    for line in LOCKS[name].read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if pinned := PINNED.fullmatch(line):
            found.append((pinned[1], pinned[2], 0))
        else:
            assert HASH.fullmatch(line), f"{name}: {line}"
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
    return found


def wanted(extra: str) -> list[Requirement]:
    """What pyproject.toml asks for, with an extra and those that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    inner = [Requirement(text) for text in extras[extra]]
    found = [Requirement(text) for text in project["dependencies"]]
    for requirement in inner:
        found += [r for name in requirement.extras for r in wanted(name)] if requirement.name == "chatmill" else [requirement]
    return found


def commands(target: str, folder: Path) -> list[list[str]]:
    """The words of each pip command that a target runs where nothing is installed."""
    words = ["make", "-n", "-C", str(ROOT), target, f"VENV={folder}/venv", f"PYTHON={sys.executable}"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line) for line in said.splitlines() if " pip install " in line]


def test_every_locked_package_has_hashes_and_a_lock_names_no_place() -> None:
    assert set(LOCKS) == {"demo", "dev", "ttsem", "deepspeed"}
    for name, path in LOCKS.items():
        found = entries(name)
        assert found and all(count for *_, count in found), [package for package, _, count in found if not count]
        assert "://" not in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize(("extra", "names"), [("demo", ("demo",)), ("dev", ("dev", "ttsem")), ("gpu", ("dev", "deepspeed"))])
def test_the_locks_hold_all_that_pyproject_asks_for_in_a_version_that_it_takes(extra: str, names: tuple[str, ...]) -> None:
    locked = [(package, version) for name in names for package, version, _ in entries(name)]
    for requirement in wanted(extra):
        name = canonicalize_name(requirement.name)
        versions = [version for package, version in locked if package == name]
        assert versions or name in LEFT_OUT, f"{name} is not locked: make lock"
        assert all(requirement.specifier.contains(version) for version in versions), (
            f"{requirement}, locked {versions}: make lock"
        )


def test_the_locks_agree_with_each_other_and_with_the_tested_versions() -> None:
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    demo, dev = entries("demo"), entries("dev")
    assert set(demo) <= set(dev)
    for package, version, _ in [*dev, *entries("ttsem"), *entries("deepspeed")]:
        assert tested.get(package, version) == version, f"{package}: make lock"


def test_all_but_torch_and_the_checkout_is_installed_by_hash(tmp_path: Path) -> None:
    unlocked = []
    for words in commands(f"{tmp_path}/venv/.deepspeed", tmp_path):
        if "--require-hashes" in words:
            assert "--no-deps" in words and (ROOT / words[words.index("-r") + 1]).is_file()
        else:
            unlocked.append([word for word in words[words.index("install") + 1 :] if not word.startswith("-")][-1])
    assert unlocked == ["torch", "."]


def make_wheel(folder: Path, content: str) -> str:
    """Write the wheel of a package `sample`; its sha256."""
    folder.mkdir(exist_ok=True)
    info = "sample-1.0.dist-info"
    texts = {
        "sample.py": content,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    path = folder / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in texts.items():
            wheel.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(text)}")
        wheel.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_package_that_was_changed_is_refused(tmp_path: Path) -> None:
    """The command of `make venv`, with an index of one package."""
    index, lock = tmp_path / "index", tmp_path / "lock.txt"
    (words, *_) = [words for words in commands("venv", tmp_path) if "--require-hashes" in words]
    options = words[words.index("install") + 1 : words.index("-r")]
    command = [
        sys.executable,
        "-I",
        "-m",
        "pip",
        "install",
        *options,
        "--no-index",
        "--find-links",
        str(index),
        "-r",
        str(lock),
    ]

    def install(target: str) -> tuple[int, str]:
        done = subprocess.run([*command, "--target", str(tmp_path / target)], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    lock.write_text(f"sample==1.0 \\\n    --hash=sha256:{make_wheel(index, 'x = 1')}\n")
    code, said = install("right")
    assert code == 0 and (tmp_path / "right" / "sample.py").read_text() == "x = 1", said
    make_wheel(index, "x = 2  # somebody else's")
    code, said = install("changed")
    assert code and "DO NOT MATCH THE HASHES" in said and not (tmp_path / "changed").exists()
