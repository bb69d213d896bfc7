"""The scripts of `make gpu`, as far as they can be tested without a GPU: they must not fail there for a trivial reason."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """tests/gpu_log.py, gpu_summary.py, gpu_check.py and gpu_training.py, imported with their folder on the path."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    loaded = {}
    for name in ("gpu_log", "gpu_summary", "gpu_check", "gpu_training"):
        spec = spec_from_loader(name, SourceFileLoader(name, str(ROOT / "tests" / f"{name}.py")))
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        loaded[name] = module
    return loaded


def test_every_test_benchmark_and_override_that_is_named_exists(scripts: dict[str, ModuleType]) -> None:
    from chatmill.kernels.bench.harness import REGISTRY
    from chatmill.trainer.config import load_recipe

    check, training = scripts["gpu_check"], scripts["gpu_training"]
    sources = {}
    for name in check.TESTS:
        file, _, test = name.partition("::")
        sources[file] = (ROOT / "tests" / file).read_text()
        assert f"def {test}" in sources[file]
    assert any(check.TIMED in source for source in sources.values())
    for kernels, matches in check.BENCHES.values():
        modules = {REGISTRY[kernel][0] for kernel in kernels}
        names = [case.name for m in modules for case in __import__(m, fromlist=["x"]).bench_cases() if case.kernel in kernels]
        for match in matches:
            assert any(match in name for name in names), match
    for words in (*check.TRAININGS.values(), *check.ENGINES.values()):
        recipe = words[words.index("--recipe") + 1]
        load_recipe(recipe, ["data.path=x", *training.OVERRIDES, *(w for w in words if "=" in w)])


def test_the_carried_wheels_are_the_tested_versions() -> None:
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    carried = dict(
        line.split("==") for line in (ROOT / "tests" / "gpu_wheels.txt").read_text().splitlines() if not line.startswith("#")
    )
    for name in ("pydantic", "torchao", "webdataset"):
        assert carried[name] == tested[name]


def test_parts_run_in_the_order_asked_for_and_a_fault_costs_one_part(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    check, seen = scripts["gpu_check"], []

    def part(self: Any, name: str) -> bool:
        seen.append(name)
        if name == "tune":
            raise RuntimeError("the table is gone")
        self.report.put(name, outcome="ok")
        return True

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "describe", lambda torch: {"gpu": "none"})
    monkeypatch.setattr(check.Check, "part", part)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    words = ["--parts", "tune,imports,layer,layer", "--out", str(tmp_path / "out"), "--wheels", str(wheels)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words, "--site", str(tmp_path / "site")])
    assert check.main() == 1
    assert seen == ["tune", "imports", "layer"]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert "wheels: not installed" in text and "RuntimeError: the table is gone" in text and "== layer" in text


def test_the_summary_says_what_failed_and_whether_a_target_was_reached(scripts: dict[str, ModuleType]) -> None:
    median = {"tokens_per_s": 70000.0, "mfu": 0.57, "required_mfu": 0.5, "data_wait_share": 0.01}
    run = {
        "outcome": "ok",
        "seconds": 40,
        "figures": {"median": median, "memory_peak_bytes": 60 << 30, "first_steps_s": [9.0, 0.5]},
    }
    row = {"kernel": "rope", "case": "D128", "contender": "triton", "phase": "forward", "reason": None}
    results = [row | {"ms": 0.5, "gbytes_per_s": 3000.0}, row | {"contender": "flash", "ms": None, "reason": "not installed"}]
    content = {
        "machine": {"gpu": "NVIDIA H200", "date": "2026-01-01", "versions": {"torch": "2.11"}},
        "parts": {
            "tests": {"passed": 7, "failed": {"test_a": "1 != 2"}, "unfinished": ["test_b"]},
            "train": {"1b": run, "8b full": {"outcome": "killed: it hung", "seconds": 120, "figures": []}, "data": {}},
            "layer": {"bench": {"outcome": "ok", "seconds": 9, "figures": {"results": results}}},
            "tune": {"attention": {"outcome": "running"}},
        },
    }
    text = scripts["gpu_summary"].summary(json.loads(json.dumps(content)))
    for words in (
        "FAILED test_a: 1 != 2",
        "UNFINISHED test_b",
        "57.0 %",
        "target 56.0 % reached",
        "8b full",
        "killed: it hung",
    ):
        assert words in text
    assert "3000 GB/s" in text and "not installed" in text
    assert scripts["gpu_summary"].summary({}).strip()


def test_a_part_that_hangs_is_killed_and_what_it_wrote_is_kept(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    check = scripts["gpu_check"].Check(tmp_path / "out", budget_s=60.0, jobs=1)
    result = tmp_path / "part.json"
    result.write_text("[1]")
    assert not check.run("bench", "hangs", [sys.executable, "-c", "import time; time.sleep(1000)"], 2.5, result)
    assert check.run("bench", "ends", [sys.executable, "-c", "pass"], 50.0, tmp_path / "none.json")
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]["bench"]
    assert parts["hangs"]["outcome"].startswith("killed") and parts["hangs"]["figures"] == [1]
    assert parts["ends"]["outcome"] == "ok"


def test_tests_go_on_after_a_hang_a_crash_and_a_lost_gpu(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os, time\n"
        "def test_good(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_crash(): os._exit(11)\n"
        "def test_lost(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_hang(): time.sleep(1000)\n"
        "def test_last(): pass\n"
    )
    log = tmp_path / "log.jsonl"
    environment = {"CHATMILL_TEST_LOG": str(log), "CHATMILL_TEST_LIMIT_S": "6", "PYTHONPATH": str(ROOT / "tests"), "PATH": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "gpu_log",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        str(tmp_path),
    ]
    codes = []
    while not codes or codes[-1] not in (0, 5):
        done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path, timeout=600, check=False)
        codes.append(done.returncode)
        assert len(codes) < 6
    outcomes = {
        name.split("::")[1]: entry["outcome"]
        for name, entry in scripts["gpu_log"].read_log(log.read_text().splitlines()).items()
    }
    assert outcomes == {
        "test_good": "passed",
        "test_wrong": "failed",
        "test_crash": "started",
        "test_lost": "failed",
        "test_hang": "started",
        "test_last": "passed",
    }
    assert codes == [11, 70, 1, 0]
