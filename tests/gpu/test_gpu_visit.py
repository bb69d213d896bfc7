"""The visit to a GPU, rehearsed: it fits, nothing hangs another step, and its tables say what the figures say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
NAMES = ("gpu_log", "gpu_summary", "gpu_check", "gpu_training", "gpu_smoke", "gpu_table", "gpu_visit", "gpu_dry")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts of `make gpu`, imported by their names."""
    pytest.importorskip("triton")
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.path[:0] = [str(TESTS), str(TESTS / "gpu")]
    yield {name: importlib.import_module(name) for name in NAMES}
    for folder in (TESTS, TESTS / "gpu"):
        sys.path.remove(str(folder))
    for name in NAMES:
        sys.modules.pop(name, None)
        if (module := before[name]) is not None:
            sys.modules[name] = module


def test_both_commands_run_their_whole_plan_in_time_and_leave_their_results(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    dry, visit = scripts["gpu_dry"], scripts["gpu_visit"]
    assert dry.rehearse("first", tmp_path) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["visit"] == {step.name: "ok" for step in visit.PLAN["first"]}
    assert set(content["parts"]["train"]) == set(visit.TRAININGS)
    assert content["parts"]["smoke"].keys() == scripts["gpu_smoke"].OPS.keys()
    assert content["tables"] == ["dispatch.json", "linear_cross_entropy.json"]
    text = (tmp_path / "summary.txt").read_text()
    assert "made-up figures" in text and "causal D128 S8192" in text and "machine: 1 TFLOP/s" in text
    assert dry.rehearse("second", tmp_path / "second") == 0
    assert "decode" in json.loads((tmp_path / "second" / "gpu.json").read_text())["parts"]


def test_where_everything_hangs_every_step_is_killed_and_the_tests_still_get_their_turn(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    dry, visit = scripts["gpu_dry"], scripts["gpu_visit"]
    for name, budget_s in visit.BUDGET_S.items():
        check = dry.DryCheck(tmp_path / name, budget_s, hangs=[""])
        outcome = visit.Visit(check).go(visit.PLAN[name])
        assert check.clock < budget_s + 30 and budget_s in (560.0, 150.0)
        assert all(said.startswith(("failed", "left out")) for said in outcome.values()), outcome
        assert any("pytest" in command for command in check.commands)
    limits = [step.limit_s + visit.GRACE_S for step in visit.PLAN["first"] if step.name != "suite"]
    assert sum(limits) <= visit.BUDGET_S["first"] - 20


def test_a_hanging_hopper_check_leaves_out_all_hopper_steps_and_nothing_else(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    dry, visit = scripts["gpu_dry"], scripts["gpu_visit"]
    check = dry.DryCheck(tmp_path, 560.0, hangs=["hopper_check"])
    outcome = visit.Visit(check).go(visit.PLAN["first"])
    assert outcome.pop("hopper") == "failed" and outcome.pop("1b hopper") == "left out: its check did not end"
    assert set(outcome.values()) == {"ok"}
    assert not any("attention hopper" in word for command in check.commands for word in command)
    assert check.environment[visit.VERDICT] == str(tmp_path / "hopper.json")


def test_a_verdict_is_read_and_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from chatmill.kernels.bench import hopper_check

    def never(*_: Any) -> None:
        raise AssertionError("a check was started")

    monkeypatch.setattr(hopper_check, "guarded", never)
    path = tmp_path / "hopper.json"
    monkeypatch.setenv(hopper_check.VERDICT, str(path))
    hopper_check.why_unfit.cache_clear()
    assert "no verdict" in str(hopper_check.why_unfit())
    path.write_text(json.dumps({"one_tile": None, "backward": "error 3.1"}))
    hopper_check.why_unfit.cache_clear()
    assert hopper_check.why_unfit() is None and hopper_check.why_unfit("backward") == "error 3.1"
    assert "speed is not in" in str(hopper_check.why_unfit("speed"))
    hopper_check.why_unfit.cache_clear()


def figures(smoke: dict[str, bool] | None = None, **ms: dict[str, float]) -> dict[str, Any]:
    """gpu.json of a Hopper with these times of contenders; attention is timed packed and causal alike."""
    rows = [
        {"kernel": "attention", "case": case, "contender": name.replace("_", " "), "phase": "both", "ms": time}
        for case in ("packed D128", "causal D64", "causal D128")
        for name, time in ms.get("attention", {}).items()
    ]
    loss = [
        {"kernel": "linear_cross_entropy", "case": "N", "contender": name.replace("_", " "), "phase": "both", "ms": time}
        for name, time in ms.get("loss", {}).items()
    ]
    parts: dict[str, Any] = {name: {"bench": {"figures": {"results": r}}} for name, r in (("attention", rows), ("loss", loss))}
    parts["smoke"] = {name: {"ok": ok} for name, ok in (smoke or {}).items()}
    return {"machine": {"capability": "9.0", "date": "2026-01-01", "gpu": "H200"}, "parts": parts}


def choices(table: Any, kernel: str) -> dict[Any, list[str]]:
    return {(tuple(rule.get("capability", ())), rule.get("packed")): rule["choose"] for rule in table[kernel]}


def test_the_dispatch_table_follows_the_figures_and_only_for_this_gpu(scripts: dict[str, ModuleType]) -> None:
    table = scripts["gpu_table"]
    shipped = json.loads((table.TUNING / "dispatch.json").read_text())
    times = {"triton": 3.0, "hopper": 2.5, "hopper_fused": 2.0, "flash3": 1.0, "sdpa-cudnn": 2.2}
    found = table.dispatch_table(figures(attention=times))
    assert choices(found, "attention")[(90, 99), True] == ["flash3", "hopper", "sdpa", "triton", "flash2", "torch"]
    for key, before in choices(shipped, "attention").items():
        if key[0] != (90, 99) and key[0] != (80, 129):
            assert choices(found, "attention")[key] == before
    assert found["rms_norm"] == shipped["rms_norm"]
    wrong = {"attention hopper D64 packed": False, "attention triton D64 long": True}
    kept = table.dispatch_table(figures(wrong, attention=times))
    assert choices(kept, "attention")[(90, 99), True] == ["flash3", "sdpa", "triton", "flash2", "torch"]
    assert table.dispatch_table(figures()) is None


def test_the_loss_takes_the_faster_form_if_it_is_right_and_faster_by_more_than_noise(scripts: dict[str, ModuleType]) -> None:
    def form(smoke: dict[str, bool] | None = None, **ms: float) -> Any:
        rows = scripts["gpu_table"].loss_table(figures(smoke, loss=ms))
        return rows and {row["products"] for row in rows if row["arch"] == [90, 99] and row["bytes"] == 2}

    assert form(triton=2.0, triton_by_torch=1.5) == {"torch"}
    assert form(triton=2.0, triton_by_torch=1.99) == {"triton"}
    assert form({"loss products torch bf16": False}, triton=2.0, triton_by_torch=1.0) == {"triton"}
    assert form({"loss products triton fp32": False}, triton=1.0, triton_by_torch=2.0) == {"torch"}
    assert form() is None
