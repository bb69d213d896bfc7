"""A pytest plugin for tests on a GPU: a hang, a crash or a lost GPU costs one test, and no result is lost.

    CHATMILL_TEST_LOG=log.jsonl CHATMILL_TEST_SHARD=0/8 pytest -p gpu_log tests/kernels

Every test writes a line to the log when it starts and another when it ends. Tests that are already in the log are skipped, so
the same command continues after a crash; a test that started and never ended is the one that killed the process. A test over
its time limit (CHATMILL_TEST_LIMIT_S) ends the process with the stack on stderr, even if it hangs inside a CUDA call. The
process also ends after an error that leaves the GPU's context unusable, because all later tests would fail. GPU tests come
first; shard i/n takes every n-th test. Exit status 0: every test was run, and the log says how it went.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

LOST = ("illegal memory access", "unspecified launch failure", "device-side assert", "misaligned address", "launch timed out")
LOST_EXIT = 70


def read_log(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Last entry per test: outcome `passed`, `failed` or `skipped`, or `started` if the test never ended."""
    entries: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off when the process died
            continue
        entries[entry["test"]] = entry
    return entries


def is_lost(message: str) -> bool:
    """Whether an error means that this process can no longer use its GPU."""
    return "CUDA" in message and any(words in message for words in LOST)


class GpuLog:
    """Writes the log and watches the clock; one per process."""

    def __init__(self, path: Path, shard: str, limit_s: float) -> None:
        self._path, self._limit_s = path, limit_s
        self._part, self._parts = (int(x) for x in shard.split("/"))
        self._lost = False
        self._done = set(read_log(path.read_text().splitlines())) if path.exists() else set()

    def _write(self, **entry: Any) -> None:
        with self._path.open("a") as handle:
            handle.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
        items[:] = [item for item in items[self._part :: self._parts] if item.nodeid not in self._done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self._lost:
            os._exit(LOST_EXIT)
        self._write(test=nodeid, outcome="started", time=round(time.time(), 1))
        faulthandler.dump_traceback_later(self._limit_s, exit=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        message = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = f"{crash.path}:{crash.lineno}: {crash.message}" if crash is not None else str(report.longrepr)
            self._lost |= is_lost(message)
        self._write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), message=message[:600])

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.TESTS_FAILED:  # the log has them; a test over its time limit also exits with 1
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin if a log is asked for."""
    path = os.environ.get("CHATMILL_TEST_LOG")
    if path:
        limit_s = float(os.environ.get("CHATMILL_TEST_LIMIT_S", "120"))
        config.pluginmanager.register(GpuLog(Path(path), os.environ.get("CHATMILL_TEST_SHARD", "0/1"), limit_s))
