"""The gates can be run with another triton than the installed one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import chatmill
from chatmill.kernels.gates import versions


def test_the_triton_of_a_folder_comes_before_the_installed_one(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("__version__ = 'of the folder'\n")
    code = "import sys; from chatmill.kernels.gates.versions import use_triton; use_triton(sys.argv[1])\n"
    code += "import triton; print(triton.__version__)"
    environment = os.environ | {"PYTHONPATH": str(Path(chatmill.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "of the folder\n"


def test_a_folder_without_triton_or_a_late_call_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pip install --no-deps --target"):
        versions.use_triton(tmp_path)
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.setitem(sys.modules, "triton", versions)
    with pytest.raises(RuntimeError, match="imported before"):
        versions.use_triton(tmp_path)


def test_a_version_is_installed_once_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def pip(command: list[str], check: bool) -> None:
        calls.append(command)
        if len(calls) == 1:
            raise subprocess.CalledProcessError(1, command)
        (Path(command[command.index("--target") + 1]) / "triton").mkdir(parents=True)

    monkeypatch.setattr(versions.subprocess, "run", pip)
    with pytest.raises(subprocess.CalledProcessError):
        versions.installed("triton", "3.9.0", tmp_path)
    assert list(tmp_path.iterdir()) == []
    folder = versions.installed("triton", "3.9.0", tmp_path)
    assert folder == versions.installed("triton", "3.9.0", tmp_path) == tmp_path / "triton-3.9.0"
    assert len(calls) == 2 and calls[1][-1] == "triton==3.9.0" and "--no-deps" in calls[1]


def test_the_newest_version_is_the_one_that_pip_would_install(monkeypatch: pytest.MonkeyPatch) -> None:
    report = '{"install": [{"metadata": {"name": "triton", "version": "3.10.1"}}]}'

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "triton" and "--dry-run" in command, "asked for, not installed"
        return subprocess.CompletedProcess(command, 0, report, "")

    monkeypatch.setattr(versions.subprocess, "run", pip)
    assert versions.newest("triton") == "3.10.1"
