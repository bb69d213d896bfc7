"""The sweep's journal after a full disk or a kill: a line that was cut costs no trial, now or in journals of before."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from chatmill.config import ConfigError
from chatmill.launcher.sweep.config import SweepConfig, load_sweep
from chatmill.launcher.sweep.study import JOURNAL, ask, open_study, put_back

from .test_sweep import sweep_file


@pytest.fixture
def sweep(tmp_path: Path) -> SweepConfig:
    return load_sweep(sweep_file(tmp_path, sampler="random", trials=6))


def state(sweep: SweepConfig) -> list[tuple[str, float | None, dict[str, Any]]]:
    """Every trial as a worker that starts now sees it."""
    return [(trial.state.name, trial.value, trial.params) for trial in open_study(sweep).get_trials(deepcopy=False)]


def cut(journal: Path, line: bytes, share: float = 0.6) -> None:
    with journal.open("ab") as file:
        file.write(line[: int(share * len(line))])


def test_a_journal_whose_last_line_was_cut_is_read_and_goes_on(sweep: SweepConfig) -> None:
    study, journal = open_study(sweep), sweep.folder / JOURNAL
    first = ask(study, sweep)
    study.tell(first.number, 0.5)
    before, last = state(sweep), journal.read_bytes().splitlines(keepends=True)[-1]
    cut(journal, last)
    assert state(sweep) == before
    seconds = [ask(open_study(sweep), sweep) for _ in range(2)]  # the first line after a cut, and those behind it
    study.tell(seconds[0].number, 0.25)  # by a worker that began before
    open_study(sweep).tell(seconds[1].number, 0.125)
    assert [(name, value) for name, value, _ in state(sweep)] == [("COMPLETE", 0.5), ("COMPLETE", 0.25), ("COMPLETE", 0.125)]
    assert [params for *_, params in state(sweep)] == [trial.params for trial in (first, *seconds)]


def test_a_journal_that_optuna_went_on_writing_behind_a_cut_line_is_read_whole(sweep: SweepConfig) -> None:
    study, journal = open_study(sweep), sweep.folder / JOURNAL
    for value in (0.5, 0.25):
        study.tell(ask(study, sweep).number, value)
    whole, lines = state(sweep), journal.read_bytes().splitlines(keepends=True)
    for at in range(len(lines)):
        spoilt = [*lines[:at], lines[at - 1][: 7 + 20 * (at % 3)], *lines[at:]]  # joined with the line behind it
        journal.write_bytes(b"".join(spoilt))
        assert state(sweep) == whole, at


def test_a_line_that_nobody_can_read_is_named(sweep: SweepConfig) -> None:
    open_study(sweep)
    journal = sweep.folder / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"op_code":4,"trial_id":\n' + journal.read_bytes())
    with pytest.raises(ConfigError, match=r"journal\.log, line \d+: damaged"):
        open_study(sweep)


@pytest.mark.parametrize("room", [10, 150, 300, 500])
def test_a_disk_that_fills_up_while_a_trial_is_put_back_loses_no_trial(sweep: SweepConfig, room: int) -> None:
    """A real limit of the system, in the first to the last line that is written: then a worker begins with room again."""
    study, journal = open_study(sweep), sweep.folder / JOURNAL
    trial = ask(study, sweep)
    before, limits = journal.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            put_back(study, trial.number, sweep)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = journal.read_bytes()
    assert after.startswith(before) and after.endswith(b"\n")
    os.utime(sweep.folder / "runs" / "trial-0000" / "heartbeat", (1.0, 1.0))  # that worker has ended
    again, other = ask(open_study(sweep), sweep), ask(open_study(sweep), sweep)
    assert again.params == trial.params and again.user_attrs["run"] == "trial-0000"
    assert other.params != trial.params and other.user_attrs["run"] != "trial-0000"
