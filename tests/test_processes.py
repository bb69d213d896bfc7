"""Whether a process is alive, judged by more than its number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatmill.launcher.runs.status import describe
from chatmill.processes import is_running, own_process
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
