"""The page that a failed attempt leaves, and the time that attempts took."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from chatmill.launcher.runs.status import describe, show
from chatmill.launcher.supervise.cause_page import PAGE, render, write_page
from chatmill.launcher.supervise.first_cause import find_cause
from chatmill.launcher.supervise.run_state import ATTEMPTS, attempt_spans, attempts
from chatmill.run_files import append_jsonl


def failed_run(folder: Path) -> Path:
    """Attempt 1 failed at step 7 in rank 1, whose error every other rank's lost connection followed."""
    now = time.time()
    logs = folder / "logs" / "attempt-001" / "node-0" / "none_x" / "attempt_0"
    for rank, words in enumerate(("RuntimeError: Connection closed by peer", "in step\nRuntimeError: matrix is singular")):
        (logs / str(rank)).mkdir(parents=True)
        (logs / str(rank) / "stdout.log").touch()
        (logs / str(rank) / "stderr.log").write_text(f"Traceback (most recent call last)\n{words}\n")
        message = {"message": words.splitlines()[-1], "extraInfo": {"timestamp": str(int(now) - rank)}}
        (logs / str(rank) / "error.json").write_text(json.dumps({"message": message}))
    (folder / "config.yaml").write_text("train: {steps: 100}\n")
    append_jsonl(folder / "events.jsonl", {"time": now - 50, "event": "start", "step": 0, "uids": ["a"] * 99})
    for step in range(1, 7):
        line = {"step": step, "loss": 8 - step, "grad_norm": 0.5, "tokens": 9, "tokens_per_s": 1.0, "time": now - 10 + step}
        append_jsonl(folder / "metrics.jsonl", line)
    line = {"attempt": 1, "job": "77", "nodes": ["n1"], "time": now - 60, "step": -1}
    append_jsonl(folder / ATTEMPTS, line | {"event": "begin"})
    append_jsonl(folder / ATTEMPTS, line | {"event": "end", "time": now, "step": 4, "outcome": "failed", "code": 1})
    return folder


def test_a_failed_attempt_leaves_one_page_that_says_what_happened_where_and_what_to_do(tmp_path: Path) -> None:
    run = failed_run(tmp_path / "broken")
    (attempt,) = attempts(run)
    page = write_page(run, attempt, find_cause(run / "logs" / "attempt-001"))
    assert page == run / "logs" / "attempt-001" / PAGE
    text = page.read_text()
    for expected in (
        "broken: attempt 1 failed (exit code 1)",
        "first cause  node 0, local rank 1: RuntimeError: matrix is singular",
        "60 s after the attempt began",
        "n1, job 77",
        "steps up to 6 were computed; the newest checkpoint is of step 4",
        "    in step\n    RuntimeError: matrix is singular",
        "rank 0: RuntimeError: Connection closed by peer",
        "step 6  loss 2.0000  grad norm 0.500",
        f"chatmill logs {run} --rank 1 --attempt 1",
        f"chatmill data at {run} 7",
    ):
        assert expected in text, text
    assert "uids" not in text, "a page is read, not searched"
    assert str(page) in show(describe(run, {}))


def test_the_page_of_a_run_that_said_nothing_is_still_a_page(tmp_path: Path) -> None:
    append_jsonl(tmp_path / ATTEMPTS, {"attempt": 1, "job": "local-1", "nodes": [], "time": 5.0, "step": -1, "event": "begin"})
    (attempt,) = attempts(tmp_path)
    text = render(tmp_path, attempt, None)
    assert "no rank said why" in text and "there is no checkpoint yet" in text
    assert write_page(tmp_path, attempt, None) is None, "its log folder is gone"


def test_goodput_counts_the_time_of_attempts_by_hand_and_not_the_night_between_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 100}\n")
    (tmp_path / "PREEMPTED").touch()
    night = time.time() - 50_000
    for began, first in ((night, 1), (night + 40_000, 5)):
        append_jsonl(tmp_path / "events.jsonl", {"time": began, "event": "start" if first == 1 else "resume"})
        for step in range(first, first + 4):
            line = {"step": step, "loss": 2.0, "tokens": 10, "tokens_per_s": 1.0, "time": began + 20 + 10 * (step - first)}
            append_jsonl(tmp_path / "metrics.jsonl", line)
    assert [ended - began for began, ended in attempt_spans(tmp_path, active=False)] == pytest.approx([50, 50])
    found = describe(tmp_path, {})
    assert (found.attempts, found.step) == (2, 8)
    assert found.goodput == pytest.approx(8 * 10 / 100)
    began = night + 100
    append_jsonl(tmp_path / ATTEMPTS, {"attempt": 1, "job": "1", "nodes": [], "time": began, "step": 4, "event": "begin"})
    end = {"attempt": 1, "time": began + 7, "step": 4, "event": "end", "outcome": "failed"}
    append_jsonl(tmp_path / ATTEMPTS, end)
    assert [ended - began for began, ended in attempt_spans(tmp_path, active=False)] == pytest.approx([50, 7, 50])
