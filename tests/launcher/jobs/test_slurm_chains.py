"""Chains of jobs (sbatch --array=1-N%1) on a real Slurm: how each element ends, and status and cancel from outside.

The trainer is a stand-in that takes milliseconds; test_slurm.py has a chain that trains.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.launcher.slurm_cluster import SlurmCluster, missing_programs
from tests.launcher.tiny_run import wait_until

from chatmill.launcher.__main__ import main
from chatmill.launcher.supervise.run_state import attempts

ROOT = Path(__file__).resolve().parents[3]
REASON = missing_programs()
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

TRAINER = """\
import os, signal, sys, time
from pathlib import Path
from chatmill.run_files import leave_refusal
run, stop = Path(os.environ["CHATMILL_RUN_DIR"]), []
if "refuse" in sys.argv: leave_refusal("a recipe that cannot work"); sys.exit(1)
if "wait" in sys.argv:
    signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
    (run / f"ready-{os.environ['CHATMILL_ATTEMPT']}").touch()
    while not stop: time.sleep(0.02)
    (run / "PREEMPTED").write_text("saved")
"""
STAND_IN = """\
#!/bin/bash
case $2 in
  chatmill.launcher.jobs.resolve) echo {folder}/run-$SLURM_ARRAY_JOB_ID; echo "$6" ;;
  torch.distributed.run) exec {python} {folder}/trainer.py "$@" ;;
  *) exec {python} "$@" ;;
esac
"""


class Bench:
    """A cluster and a stand-in for the trainer, which waits for a signal, refuses, or finishes."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def submit(self, elements: int, behaviour: str) -> tuple[str, Path]:
        """A chain; returns its array's id and its run folder."""
        words = [f"--array=1-{elements}%1", f"--output={self.folder}/%A-%a.out", "slurm/train.sh", behaviour]
        array = self.cluster.sbatch(*words, cwd=ROOT, extra={"CHATMILL_PYTHON": str(self.folder / "python")})
        return array, self.folder / f"run-{array}"

    def end(self, array: str, element: int) -> tuple[str, str]:
        """State of an element that has ended, with its exit code, and what it printed."""
        state = self.cluster.wait(f"{array}_{element}", 120)
        file = self.folder / f"{array}-{element}.out"
        return f"{state} {self.cluster.field(f'{array}_{element}', 'ExitCode')}", file.read_text() if file.exists() else ""

    def near_the_time_limit(self, run: Path, attempt: int) -> None:
        """What Slurm does then (--signal=B:USR1): a signal to the batch script, which is the supervisor."""
        wait_until("the trainer", (run / f"ready-{attempt}").exists, 120)
        os.kill(attempts(run)[-1].lines["pid"], signal.SIGUSR1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("chains")
    (folder / "trainer.py").write_text(TRAINER)
    (folder / "python").write_text(STAND_IN.format(folder=folder, python=sys.executable))
    (folder / "python").chmod(0o755)
    with SlurmCluster(folder / "cluster", nodes=1) as cluster:
        yield Bench(cluster, folder)


def test_the_last_element_of_a_chain_fails_when_the_run_is_not_finished(bench: Bench) -> None:
    array, run = bench.submit(2, "wait")
    bench.near_the_time_limit(run, 1)
    state, said = bench.end(array, 1)
    assert state == "COMPLETED 0:0" and "the next element of the job array continues" in said
    bench.near_the_time_limit(run, 2)
    state, said = bench.end(array, 2)
    assert state == "FAILED 75:0" and "last element of the job array, and the run is NOT finished" in said
    assert [attempt.outcome for attempt in attempts(run)] == ["preempted"] * 2


def test_a_chain_is_watched_and_cancelled_as_a_whole(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", bench.cluster.environment["SLURM_CONF"])
    array, run = bench.submit(3, "wait")
    bench.near_the_time_limit(run, 1)
    began = time.monotonic()  # a signal to an element with several to come kept scancel for more than a minute
    wait_until("the second element", (run / "ready-2").exists, 120)
    assert time.monotonic() - began < 45
    assert main(["status", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["job"]) == ("RUNNING", array)
    began = time.monotonic()
    assert main(["cancel", str(run)]) == 0
    assert f"job {array}: asked to save and stop" in capsys.readouterr().out and time.monotonic() - began < 15
    state, said = bench.end(array, 2)
    assert state == "COMPLETED 0:0" and "chatmill resume` or the same command" in said
    wait_until("the end of the chain", lambda: not bench.cluster.call("squeue", "-h", "-j", array, "-o", "%i"), 60)
    assert len(attempts(run)) == 2 and main(["status", str(run)]) == 0
    assert "state       stopped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behaviour", "first", "second", "words"),
    [
        ("refuse", "FAILED 2:0", "FAILED 2:0", "was refused, and the same start would fail again"),
        ("finish", "COMPLETED 0:0", "COMPLETED 0:0", "finished the run: nothing to do"),
    ],
)
def test_the_elements_after_the_end_of_a_run_start_nothing(
    bench: Bench, behaviour: str, first: str, second: str, words: str
) -> None:
    array, run = bench.submit(2, behaviour)
    assert bench.end(array, 1)[0] == first
    state, said = bench.end(array, 2)
    assert state == second and words in said and len(attempts(run)) == 1
