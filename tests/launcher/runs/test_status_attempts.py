"""How many attempts a run had, where some were started by hand: `chatmill status` counts each start once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from chatmill.launcher.runs.status import describe
from chatmill.launcher.supervise.run_state import ATTEMPTS, attempt_spans
from chatmill.run_files import append_jsonl

DAY = time.time() - 50_000
BY_HAND: dict[str, Any] = {"attempt": None}


def supervised(run: Path, number: int, began: float, ended: float | None = None) -> None:
    begin = {"attempt": number, "job": "local-1", "nodes": [], "time": DAY + began, "step": -1, "event": "begin"}
    append_jsonl(run / ATTEMPTS, begin)
    if ended is not None:
        end = {"attempt": number, "time": DAY + ended, "step": 4, "event": "end", "outcome": "preempted", "code": 0}
        append_jsonl(run / ATTEMPTS, end)


def trainer(run: Path, began: float, **fields: Any) -> None:
    """What a trainer writes that then makes steps for 50 s."""
    event = "resume" if (run / "events.jsonl").exists() else "start"
    append_jsonl(run / "events.jsonl", {"time": DAY + began, "event": event, **fields})
    append_jsonl(run / "metrics.jsonl", {"step": 1, "loss": 2.0, "time": DAY + began + 50})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("train: {steps: 100}\n")
    return tmp_path


@pytest.mark.parametrize("old_records", [False, True], ids=["now", "0.1"])
def test_a_run_that_was_killed_with_its_supervisor_and_continued_by_hand_had_two_attempts(run: Path, old_records: bool) -> None:
    supervised(run, 1, 0)
    trainer(run, 5, **({} if old_records else {"attempt": 1}))
    trainer(run, 1_000, **({} if old_records else BY_HAND))
    assert [ended - began for began, ended in attempt_spans(run, active=False)] == pytest.approx([55, 50])
    assert describe(run, {}).attempts == 2


def test_starts_by_hand_are_counted_before_between_and_behind_those_of_supervisors(run: Path) -> None:
    trainer(run, 0, **BY_HAND)
    supervised(run, 1, 100)  # killed before its trainer began
    trainer(run, 200, **BY_HAND)
    supervised(run, 2, 300, 360)
    trainer(run, 305, attempt=2)
    trainer(run, 400, **BY_HAND)
    spans = attempt_spans(run, active=False)
    assert [began - DAY for began, _ in spans] == pytest.approx([0, 100, 200, 300, 400])
    assert [ended - began for began, ended in spans] == pytest.approx([50, 0, 50, 60, 50])


def test_a_run_that_went_on_by_hand_after_a_kill_is_described_by_its_last_start(run: Path) -> None:
    supervised(run, 1, 0)
    trainer(run, 5, attempt=1)
    assert describe(run, {}).state == "killed"
    trainer(run, 1_000, **BY_HAND)
    (run / "PREEMPTED").touch()
    found = describe(run, {})
    assert (found.state, found.detail) == ("stopped", "by a signal, started by hand; the same command continues")
