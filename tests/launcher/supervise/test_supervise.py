"""The supervisor's decisions, with a stand-in for the trainer that takes milliseconds: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatmill.launcher.supervise.first_cause import find_cause
from chatmill.launcher.supervise.run_state import (
    ATTEMPTS,
    CANCEL,
    attempts,
    failures_without_progress,
    needed_lead_s,
    newest_step,
    seconds_per_step,
)
from chatmill.launcher.supervise.slurm_job import parse_duration
from chatmill.launcher.supervise.supervise import first_port, free_port
from chatmill.run_files import append_jsonl, leave_refusal, read_jsonl

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
run, behaviour = Path(sys.argv[1]), sys.argv[2]
folder = run / "checkpoints"
done = sorted(int(file.parent.name[5:]) for file in folder.glob("step-*/manifest.json"))
def save(step):
    (folder / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    (folder / f"step-{step:08d}" / "manifest.json").write_text("{}")
start = done[-1] if done else 0
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
if behaviour == "crash": sys.exit(1)
if behaviour == "refuse": sys.exit(2)
if behaviour == "refuse-under-torchrun":
    from chatmill.run_files import leave_refusal
    leave_refusal("data.path: no data set there\\nrun: chatmill data build"); sys.exit(1)
if behaviour == "noise":
    folder = Path(os.environ["CHATMILL_LOGS"]) / "node-0" / "none_x" / "attempt_0" / "0"; folder.mkdir(parents=True)
    (folder / "stderr.log").write_text("error: command 'gcc' failed: no space left on device\\n"); sys.exit(1)
if behaviour == "crash-once-per-step": save(start + 1); sys.exit(0 if start + 1 == 5 else 1)
if behaviour == "wait":
    (run / "pid").write_text(str(os.getpid())); (run / "ready").touch()
    while not stop: time.sleep(0.01)
    save(start + 1); (run / "PREEMPTED").write_text("x")
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN); (run / "ready").touch()
    time.sleep(60)
if behaviour == "finish": save(start + 1)
if behaviour == "die-after-the-end":
    save(start + 1)
    (run / "events.jsonl").write_text('{"event": "finished", "time": %f}' % time.time())
    os.kill(os.getpid(), signal.SIGKILL)
"""


def command(tmp_path: Path, behaviour: str, *options: str) -> list[str]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "chatmill.launcher.supervise", "--run-dir", str(run), *options, "--"]
    return [*words, sys.executable, str(script), str(run), behaviour]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


def supervise(tmp_path: Path, behaviour: str, *options: str) -> subprocess.CompletedProcess[str]:
    words = command(tmp_path, behaviour, *options)
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment(), check=False)


def outcomes(tmp_path: Path) -> list[str | None]:
    return [attempt.outcome for attempt in attempts(tmp_path / "run")]


def test_a_run_that_ends_by_itself_is_started_once(tmp_path: Path) -> None:
    done = supervise(tmp_path, "finish")
    assert done.returncode == 0 and outcomes(tmp_path) == ["finished"]
    (attempt,) = attempts(tmp_path / "run")
    assert (attempt.step_before, attempt.step_after, attempt.nodes) == (-1, 1, (socket.gethostname(),))


def test_a_run_that_crashes_but_gets_further_each_time_is_started_until_it_is_done(tmp_path: Path) -> None:
    done = supervise(tmp_path, "crash-once-per-step", "--max-no-progress", "1")
    assert done.returncode == 0 and outcomes(tmp_path) == ["failed"] * 4 + ["finished"]
    assert newest_step(tmp_path / "run") == 5


def test_a_run_that_gets_no_further_is_given_up(tmp_path: Path) -> None:
    done = supervise(tmp_path, "crash", "--max-no-progress", "2")
    assert done.returncode == 1 and outcomes(tmp_path) == ["failed"] * 2
    assert (tmp_path / "run" / "logs" / "attempt-002" / "first-cause.md").is_file()
    assert "given up: 2 attempts in a row brought no newer checkpoint (no checkpoint yet)" in done.stdout


def test_a_refused_recipe_is_not_tried_twice(tmp_path: Path) -> None:
    done = supervise(tmp_path, "refuse")
    assert done.returncode == 2 and outcomes(tmp_path) == ["failed"]


def test_a_refusal_that_torchrun_turns_into_exit_code_1_is_not_tried_twice_either(tmp_path: Path) -> None:
    done = supervise(tmp_path, "refuse-under-torchrun")
    assert done.returncode == 2 and outcomes(tmp_path) == ["failed"]
    (attempt,) = attempts(tmp_path / "run")
    assert attempt.permanent and attempt.cause == "node 0, local rank 0: data.path: no data set there run: chatmill data build"


def test_what_another_program_prints_as_error_does_not_make_a_failure_permanent(tmp_path: Path) -> None:
    done = supervise(tmp_path, "noise", "--max-no-progress", "2")
    assert done.returncode == 1 and outcomes(tmp_path) == ["failed"] * 2
    assert "first cause: node 0, local rank 0: error: command 'gcc' failed" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_makes_the_run_save_and_stop(tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C ends with a code that stops what follows `&&`."""
    process = subprocess.Popen(command(tmp_path, "wait"), env=environment(), stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(number)
    assert process.wait(timeout=300) == code
    assert outcomes(tmp_path) == ["preempted"] and newest_step(tmp_path / "run") == 1


def test_a_second_signal_ends_a_run_that_does_not_listen(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path, "deaf"), env=environment(), stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    while process.poll() is None:  # where the machine is slow, the first two may have arrived as one
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert process.returncode == 128 + signal.SIGTERM
    assert outcomes(tmp_path) == ["terminated"]


def test_an_attempt_that_writes_nothing_for_too_long_is_killed(tmp_path: Path) -> None:
    done = supervise(tmp_path, "deaf", "--hang", "1", "--max-no-progress", "1")
    assert done.returncode == 1 and outcomes(tmp_path) == ["failed"] and "nothing was written" in done.stdout


def test_a_process_that_dies_after_the_run_has_finished_does_not_start_it_again(tmp_path: Path) -> None:
    done = supervise(tmp_path, "die-after-the-end")
    assert done.returncode == 0 and outcomes(tmp_path) == ["finished"]


def under_slurm(tmp_path: Path, *, element: bool = False, queued: str = "") -> dict[str, str]:
    """Variables of job 77, which may be an element of array 70, and stand-ins for Slurm's commands that note their calls."""
    array = " ArrayJobId=70 ArrayTaskId=2" if element else ""
    shown = f"JobId=77{array} JobState=RUNNING Reason=None"
    programs = {
        "scontrol": f'case "$2" in hostnames) echo a1; echo a2;; job) echo "{shown}";; esac',
        "scancel": f"kill -TERM $(cat {tmp_path}/run/pid)",  # a signal to the job's steps
        "squeue": f'case "$*" in *%L*) echo UNLIMITED;; *" -s "*) echo 77.batch 77.0;; *) echo 77 {queued};; esac',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{tmp_path}/calls\n{text}\n')
        (tmp_path / name).chmod(0o755)
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "a[1-2]"}
    return environment() | job | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "70"}  # possibly inherited from elsewhere


ENDS = {
    "job": (0, "requeued"),
    "element": (0, "the next element of the job array continues"),
    "last element": (75, "this was the last element of the job array, and the run is NOT finished"),
    "cancelled": (0, "chatmill resume` or the same command"),
}


@pytest.mark.parametrize("how", ENDS)
def test_under_slurm_a_saved_run_is_requeued_unless_a_chain_continues_it_or_it_was_cancelled(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    variables = under_slurm(tmp_path, element="element" in how, queued="78" if how == "element" else "")
    process = subprocess.Popen(command(tmp_path, "wait", "--slurm"), env=variables, stdout=subprocess.PIPE, text=True)
    wait_for(run / "ready")
    if how == "cancelled":
        (run / CANCEL).write_text("77")  # is seen without a signal
    else:
        process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=300)
    (attempt,) = attempts(run)
    assert (attempt.job, attempt.nodes, attempt.outcome) == ("77", ("a1", "a2"), "preempted")
    assert attempt.lines["array"] == ("70" if "element" in how else None)
    calls = (tmp_path / "calls").read_text()
    assert "scancel --signal=USR1 77.0\n" in calls and ("scontrol requeue 77" in calls) == (how == "job")
    code, words = ENDS[how]
    assert process.returncode == code and words in said


@pytest.mark.parametrize(
    ("outcome", "permanent", "cancelled", "code", "words"),
    [
        ("finished", False, "", 0, "job 71 of this chain finished the run"),
        ("failed", True, "", 2, "job 71 of this chain was refused, and the same start would fail again: bad recipe"),
        ("preempted", False, "70", 128 + signal.SIGTERM, "this job was cancelled"),
        ("preempted", False, "12", 0, "attempt 2 finished"),  # another job was, long ago
        ("failed", False, "", 0, "attempt 2 finished"),
    ],
)
def test_an_element_of_a_chain_starts_nothing_when_the_run_is_over(
    tmp_path: Path, outcome: str, permanent: bool, cancelled: str, code: int, words: str
) -> None:
    run = tmp_path / "run"
    line = {"time": 1.0, "attempt": 1, "job": "71", "nodes": ["a1"], "array": "70"}
    append_jsonl(run / ATTEMPTS, line | {"event": "begin", "step": -1})
    end = {"event": "end", "step": 1, "outcome": outcome, "code": 1, "cause": "bad recipe", "permanent": permanent}
    append_jsonl(run / ATTEMPTS, line | end)
    if cancelled:
        (run / CANCEL).write_text(cancelled)
    variables = under_slurm(tmp_path, element=True)
    words_of = command(tmp_path, "finish", "--slurm")
    done = subprocess.run(words_of, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code and words in done.stdout
    assert len(attempts(run)) == (2 if words.startswith("attempt") else 1)


def test_a_torchrun_inside_a_job_of_ones_own_is_stopped_like_one_anywhere_else(tmp_path: Path) -> None:
    """The steps of that job are not this run's, and the job is not ours to requeue."""
    variables = under_slurm(tmp_path)
    process = subprocess.Popen(command(tmp_path, "wait"), env=variables, stdout=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "chatmill resume` or the same command" in said and not (tmp_path / "calls").exists()


def test_an_old_preempted_mark_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "PREEMPTED").write_text("an attempt of last week")
    done = supervise(tmp_path, "crash", "--max-no-progress", "1")
    assert done.returncode == 1 and outcomes(tmp_path) == ["failed"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_failures_are_counted_per_job_and_forgotten_after_progress(tmp_path: Path) -> None:
    history = [("failed", -1, -1), ("failed", -1, 10), ("failed", 10, 10), (None, 10, 10), ("failed", 10, 10)]
    for number, (outcome, before, after) in enumerate(history, 1):
        line = {"time": number, "attempt": number, "job": "7", "nodes": ["n1"]}
        append_jsonl(tmp_path / ATTEMPTS, line | {"event": "begin", "step": before})
        if outcome:
            append_jsonl(tmp_path / ATTEMPTS, line | {"event": "end", "step": after, "outcome": outcome})
    assert failures_without_progress(tmp_path, "7") == 2
    assert failures_without_progress(tmp_path, "8") == 0
    assert [attempt.outcome for attempt in attempts(tmp_path)] == ["failed", "failed", "failed", None, "failed"]


def test_a_checkpoint_counts_only_when_its_manifest_is_there(tmp_path: Path) -> None:
    for step, whole in ((100, True), (200, True), (300, False)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / ".step-00000400.writing-1").mkdir()
    assert newest_step(tmp_path) == 200 and newest_step(tmp_path / "nothing") == -1


def test_the_lead_before_a_time_limit_comes_from_measured_steps_and_saves(tmp_path: Path) -> None:
    for step in range(10, 101, 10):  # every line covers 10 steps of 2 s
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "loss": 1.0, "tokens": 2000, "tokens_per_s": 100.0})
    assert seconds_per_step(tmp_path) == pytest.approx(2.0) and needed_lead_s(tmp_path) is None
    append_jsonl(tmp_path / "events.jsonl", {"event": "checkpoint", "step": 50, "seconds": 7.0})
    append_jsonl(tmp_path / "events.jsonl", {"event": "checkpoint", "step": 100, "seconds": 40.0})
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 100, "eval": {"loss": 1.0}, "seconds": 12.0})
    assert needed_lead_s(tmp_path) == pytest.approx(2 * 2.0 + 2 * 40.0 + 12.0 + 30.0)


def test_neighbouring_jobs_and_attempts_have_ports_of_their_own() -> None:
    ports = {first_port(str(job), attempt) for job in range(5000, 6200) for attempt in range(1, 4)}
    assert len(ports) == 3600 and min(ports) >= 20000 and max(ports) < 32000


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) > port


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-02:03:04", 93784.0), ("02:03:04", 7384.0), ("3:04", 184.0), ("UNLIMITED", None), ("INVALID", None)],
)
def test_slurm_durations_are_understood(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


def write_rank(logs: Path, node: int, rank: int, error: str | None, at: int = 0, stderr: str = "") -> None:
    folder = logs / f"node-{node}" / "none_x" / "attempt_0" / str(rank)
    folder.mkdir(parents=True)
    (folder / "stdout.log").write_text("")
    (folder / "stderr.log").write_text(stderr)
    if error:
        (folder / "error.json").write_text(json.dumps({"message": {"message": error, "extraInfo": {"timestamp": str(at)}}}))


LOST = "RuntimeError: [gloo/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"


def test_the_first_error_is_the_cause_not_the_connections_lost_after_it(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, 0, LOST, at=99)
    write_rank(tmp_path, 0, 1, "OutOfMemoryError: CUDA out of memory", at=100)
    write_rank(tmp_path, 1, 0, LOST, at=101)
    cause = find_cause(tmp_path)
    assert cause is not None and (cause.node, cause.local_rank, cause.message) == (0, 1, "OutOfMemoryError: CUDA out of memory")
    assert not cause.permanent


def test_a_rank_that_was_killed_is_the_cause_when_the_others_only_lost_it(tmp_path: Path) -> None:
    for node, rank in ((0, 0), (0, 1), (1, 0)):
        write_rank(tmp_path, node, rank, LOST, at=100 + rank)
    write_rank(tmp_path, 1, 1, None)
    cause = find_cause(tmp_path)
    assert cause is not None and (cause.node, cause.local_rank) == (1, 1) and "killed from outside" in cause.message


def test_a_refused_recipe_is_a_permanent_cause(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, 0, LOST, at=1)
    write_rank(tmp_path, 1, 0, None, stderr="error: data.path: no data set there\nrun: chatmill data build\n")
    leave_refusal("data.path: no data set there\nrun", {"CHATMILL_LOGS": str(tmp_path), "GROUP_RANK": "1", "LOCAL_RANK": "0"})
    cause = find_cause(tmp_path)
    assert cause is not None and cause.permanent and str(cause) == "node 1, local rank 0: data.path: no data set there run"
    assert cause.log.name == "stderr.log" and "node-1" in str(cause.log)


def test_without_error_files_the_first_rank_that_lost_more_than_a_connection_is_the_cause(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, 0, None, stderr=f"Traceback (most recent call last):\n{LOST}\n")
    write_rank(tmp_path, 0, 1, None, stderr="[W101] Error of no weight\nZeroDivisionError: division by zero\n")
    write_rank(tmp_path, 1, 0, None, stderr="ValueError: a later one\n")
    assert str(find_cause(tmp_path)) == "node 0, local rank 1: ZeroDivisionError: division by zero"


def test_nothing_said_is_no_cause(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, 0, None)
    assert find_cause(tmp_path) is None
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []
