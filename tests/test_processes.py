"""Whether a process is alive, judged by more than its number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from chatmill.launcher.runs.control import cancel
from chatmill.launcher.runs.status import describe
from chatmill.launcher.supervise.run_state import ATTEMPTS
from chatmill.launcher.sweep.study import HEARTBEAT, beat, is_alive
from chatmill.processes import is_running, own_process, process_mark, send_signal
from chatmill.run_files import append_jsonl

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
SAY = "import json, sys; from chatmill.processes import *; print(json.dumps(own_process()), flush=True); sys.stdin.read()"


def test_a_process_is_told_from_a_later_one_with_its_number_and_from_a_dead_one() -> None:
    mark = own_process()
    assert is_running(mark) is True
    assert is_running(mark | {"started": mark["started"] - 1}) is False
    for elsewhere in ({"host": "another"}, {"boot": "another"}, {"namespace": "another"}, {"pid": "x"}):
        assert is_running(mark | elsewhere) is None, elsewhere
    assert is_running({}) is None and is_running(None) is None
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_running(mark | {"pid": child.pid}) is False, "dead, though nobody has waited for it yet"
    child.wait()


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs on."""
    child = subprocess.Popen([sys.executable, "-c", SAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline()
    yield child
    child.kill()
    child.wait()


def test_a_signal_reaches_the_process_of_the_mark_or_none(stranger: subprocess.Popen[str]) -> None:
    mark = process_mark(stranger.pid)
    for other in (mark | {"started": mark["started"] - 1}, mark | {"host": "another"}, {}):
        assert not send_signal(other, signal.SIGKILL)
    assert stranger.poll() is None
    assert send_signal(mark, signal.SIGTERM) and stranger.wait(10) == -signal.SIGTERM
    assert not send_signal(mark, signal.SIGTERM)


@pytest.mark.parametrize("record", ["attempt", "attempt of version 0.1", "by hand"])
def test_cancel_signals_nobody_who_only_has_the_number(
    tmp_path: Path,
    stranger: subprocess.Popen[str],
    record: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run's process is gone and its number belongs to another run's supervisor, which looks just like it."""
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {steps: 2}\n")
    reused = process_mark(stranger.pid) | {"started": 1}
    line = {"time": 1.0, "event": "begin", "attempt": 1, "job": "local-1", "nodes": ["n"], "step": 0, "port": 1}
    line |= {"pid": stranger.pid, "host": os.uname().nodename}
    if record == "by hand":
        (run / "environment.json").write_text(json.dumps({"process": reused}))
        append_jsonl(run / "events.jsonl", {"event": "start", "time": 1.0, "step": 0})
    else:
        append_jsonl(run / ATTEMPTS, line | ({"process": reused} if record == "attempt" else {}))
        words = ["python", "-m", "chatmill.launcher.supervise", "--run-dir", str(tmp_path / "runs" / "b"), "--"]
        monkeypatch.setattr(psutil.Process, "cmdline", lambda _: words)
    cancel(str(run), now=True)
    assert "is not running: nothing to cancel" in capsys.readouterr().out
    assert stranger.poll() is None


def test_a_sweep_s_trial_is_orphaned_when_its_number_was_reused(tmp_path: Path, stranger: subprocess.Popen[str]) -> None:
    beat(tmp_path)
    assert is_alive(tmp_path)
    (tmp_path / HEARTBEAT).write_text(json.dumps(process_mark(stranger.pid) | {"started": 1}))
    assert not is_alive(tmp_path)
    (tmp_path / HEARTBEAT).write_text("another-host 17\n")  # as version 0.1 wrote it: only its age counts
    assert is_alive(tmp_path)


def test_status_knows_whether_a_run_started_by_hand_is_alive(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 2}\n")
    append_jsonl(tmp_path / "events.jsonl", {"event": "start", "time": 1.0, "step": 0})
    child = subprocess.Popen([sys.executable, "-c", SAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    (tmp_path / "environment.json").write_text('{"process": ' + child.stdout.readline() + "}")
    found = describe(tmp_path, {})
    assert (found.state, f"process {child.pid}" in found.detail) == ("running", True)
    child.kill()
    child.wait()
    assert describe(tmp_path, {}).state == "ended", "at once, however fresh its files are"
    (tmp_path / "PREEMPTED").touch()
    assert describe(tmp_path, {}).state == "stopped"
