"""Keeps one run going: start the whole group, forward stop signals, start again after a failure, hand back to Slurm.

    python -m chatmill.launcher.supervise --run-dir runs/x -- torchrun ...
    exec python -m chatmill.launcher.supervise --slurm --run-dir "$run" -- srun ... torchrun ...     (slurm/train.sh)

One attempt = one start of all processes. What ends it, and what follows:
    finished    exit code 0 and no PREEMPTED mark: done.
    preempted   the trainer saved and left PREEMPTED (a signal came): under Slurm the job is requeued, else we stop. A run that
                `chatmill cancel` stopped (logs/cancel) is never requeued. In a chain of jobs the next element continues; the
                last one ends with exit code 75 and says so.
    terminated  this process itself got SIGTERM (scancel, or Slurm requeueing by itself): stop, Slurm decides.
    failed      anything else: the first cause is printed and all processes are started again, unless the recipe itself was
                refused or `--max-no-progress` attempts in a row brought no newer checkpoint.
Only the standard library is used: with containers this runs outside the image. All state is kept in the run folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from chatmill.processes import own_process
from chatmill.run_files import PREEMPTED, append_jsonl, read_jsonl
from chatmill.shell import in_this_shell

from .cause_page import write_page
from .first_cause import Cause, find_cause
from .run_state import (
    ATTEMPTS,
    CANCEL,
    attempt_logs,
    attempts,
    cancelled_job,
    failures_without_progress,
    last_activity,
    needed_lead_s,
    newest_step,
    now,
)
from .slurm_job import SlurmJob

LOGS = "{attempt-logs}"  # in a word of the command: the attempt's log folder
TRY_LATER = 75  # EX_TEMPFAIL: the run is not finished and can be continued by the same command
BAD_NODE_PREFIX = "bad-node-"


class Signals:
    """Remembers which stop signals came; SIGTERM is kept apart because under Slurm it means that Slurm ends the job itself."""

    def __init__(self) -> None:
        self.stop = False
        self.terminated = self.interrupted = False
        self.count = 0
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
        self.terminated = self.terminated or number != signal.SIGUSR1
        self.interrupted = self.interrupted or number == signal.SIGINT
        self.count += 1


def first_port(job: str, attempt: int) -> int:
    """A rendezvous port of this job and attempt: 20000-31999, below Linux's range of ephemeral ports.

    Jobs whose ids differ by less than 1200 never share one, so two jobs on one node do not meet.
    """
    number = int("".join(c for c in job if c.isdigit()) or "0")
    return 20000 + number % 1200 * 10 + attempt % 10


def free_port(first: int) -> int:
    """The first port at or after `first` on which nothing listens on this machine."""
    for port in range(first, first + 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port in {first}..{first + 199}")


def supervise(
    run_dir: Path, command: list[str], max_no_progress: int, lead_s: float, hang_s: float = 0.0, under_slurm: bool = False
) -> int:
    """Run attempts until the run is done, handed back or given up; returns the exit code.

    lead_s: seconds before the time limit at which Slurm signals. Where the run's own figures ask for more, the stop is asked
    for earlier from here. hang_s: kill an attempt that writes no record for this long (0: never). under_slurm: the command
    starts steps of this Slurm job, which may be requeued; a torchrun that someone starts in a job of his own is none of that.
    """
    signals = Signals()
    slurm = SlurmJob.current() if under_slurm else None
    job = slurm.id if slurm else f"local-{os.getpid()}"
    if slurm is not None and (code := _over_already(run_dir, slurm)) is not None:
        return code
    (run_dir / CANCEL).unlink(missing_ok=True)
    while True:
        number = len(attempts(run_dir)) + 1
        port = free_port(first_port(job, number))
        logs = attempt_logs(run_dir, number)
        logs.mkdir(parents=True, exist_ok=True)
        (run_dir / PREEMPTED).unlink(missing_ok=True)
        before = newest_step(run_dir)
        nodes = slurm.nodes if slurm else [socket.gethostname()]
        since = now()
        began = {"time": since, "event": "begin", "attempt": number, "job": job, "nodes": nodes, "step": before, "port": port}
        place = {"pid": os.getpid(), "host": socket.gethostname(), "process": own_process(), "log": own_output()}
        append_jsonl(run_dir / ATTEMPTS, began | place | {"array": slurm.array if slurm else None})
        say(f"attempt {number} on {' '.join(nodes)}, {describe_step(before)}, rendezvous port {port}, logs in {logs}")
        deadline = _early_stop(run_dir, slurm, lead_s)
        environment = os.environ | {"CHATMILL_ATTEMPT": str(number), "CHATMILL_LOGS": str(logs), "MASTER_PORT": str(port)}
        words = [word.replace(LOGS, str(logs)) for word in command]
        code = run_attempt(words, environment, signals, slurm, run_dir, deadline, hang_s)
        if code and is_finished(run_dir, since):
            say(f"exit code {code}, but the run had already finished: a signal reached processes that were exiting")
            code = 0
        after = newest_step(run_dir)
        preempted = (run_dir / PREEMPTED).is_file()
        cause: Cause | None = None
        if code == 0 and not preempted:
            outcome = "finished"
        elif preempted:
            outcome = "preempted"
        elif signals.stop:
            outcome = "terminated"
        else:
            outcome, cause = "failed", find_cause(logs)
        ended = {"time": now(), "event": "end", "attempt": number, "step": after, "outcome": outcome, "code": code}
        permanent = outcome == "failed" and (code == 2 or (cause is not None and cause.permanent))
        append_jsonl(run_dir / ATTEMPTS, ended | {"cause": str(cause) if cause else None, "permanent": permanent})
        say(f"attempt {number} {outcome} (exit code {code}), {describe_step(after)}")
        if outcome == "finished":
            return 0
        stale = failures_without_progress(run_dir, job)
        if outcome == "failed":
            say(f"first cause: {cause}" if cause else f"no rank said why; see {logs}")
            if page := write_page(run_dir, attempts(run_dir)[-1], cause):
                say(f"all about it: {page}")
            if permanent:
                say("the same start would fail again: not restarted")
                return 2
        if stale >= max_no_progress:
            say(f"given up: {stale} attempts in a row brought no newer checkpoint ({describe_step(after)})")
            return 1
        if outcome in ("preempted", "terminated"):
            return _hand_back(slurm, signals, outcome, (run_dir / CANCEL).is_file())
        bad = [path.name.removeprefix(BAD_NODE_PREFIX) for path in logs.glob(BAD_NODE_PREFIX + "*")]
        if bad and slurm is not None and slurm.array is None:
            say(f"{', '.join(bad)} failed the node check: requeued without that node")
            return 0 if slurm.requeue(exclude=bad) else 1
        pause = min(30.0, 2.0**stale - 1.0)
        if pause:
            say(f"starting again in {pause:.0f} s ({stale} of {max_no_progress} failures without progress)")
            _sleep(pause, signals)
            if signals.stop:
                return _hand_back(slurm, signals, "terminated", (run_dir / CANCEL).is_file())


def _over_already(run_dir: Path, slurm: SlurmJob) -> int | None:
    """Exit code of a job that has nothing to do any more, or None."""
    if cancelled_job(run_dir) in (slurm.id, slurm.array):
        say("this job was cancelled (`chatmill cancel`): nothing was started")
        return 128 + signal.SIGTERM
    earlier = [attempt for attempt in attempts(run_dir) if slurm.array and attempt.lines.get("array") == slurm.array]
    if earlier and earlier[-1].outcome == "finished":
        say(f"job {earlier[-1].job} of this chain finished the run: nothing to do")
        return 0
    if earlier and earlier[-1].permanent:
        say(f"job {earlier[-1].job} of this chain was refused, and the same start would fail again: {earlier[-1].cause}")
        return 2
    return None


def _early_stop(run_dir: Path, slurm: SlurmJob | None, lead_s: float) -> float | None:
    needed = needed_lead_s(run_dir)
    left = slurm.seconds_left() if slurm else None
    if needed is None or left is None or needed <= lead_s:
        return None
    say(f"a save needs {needed:.0f} s, but Slurm signals {lead_s:.0f} s before the end: the stop comes earlier")
    return time.monotonic() + max(0.0, left - needed)


def _hand_back(slurm: SlurmJob | None, signals: Signals, outcome: str, cancelled: bool) -> int:
    if slurm is None or cancelled:
        say("stopped; `chatmill resume` or the same command continues")
        if signals.interrupted:  # Ctrl-C: what follows `&&` must not begin
            return 128 + signal.SIGINT
        return 0 if outcome == "preempted" else 128 + signal.SIGTERM
    if signals.terminated:
        say("Slurm ends this job itself: leaving")
        return 0 if outcome == "preempted" else 128 + signal.SIGTERM
    if slurm.array is not None:
        if slurm.has_successor():
            say("the next element of the job array continues")
            return 0
        say(
            "this was the last element of the job array, and the run is NOT finished: submit the same command again to continue"
        )
        return TRY_LATER
    if slurm.requeue():
        say("requeued; the same job continues when it starts again")
        return 0
    say("could not requeue; submit the same command again to continue")
    return TRY_LATER


def run_attempt(
    command: list[str],
    environment: dict[str, str],
    signals: Signals,
    slurm: SlurmJob | None,
    run_dir: Path,
    deadline: float | None,
    hang_s: float,
) -> int:
    """Start the command, forward stop signals until it ends; returns its exit code (negative: killed by that signal).

    Under Slurm the signal is sent to the job's steps repeatedly until they have saved: ranks that are still loading miss the
    first one, and a rank that is leaving Python would die of a further one. Locally one SIGTERM goes to the launcher, which
    hands it to its workers; a second Ctrl-C kills.
    """
    child = subprocess.Popen(command, env=environment, start_new_session=slurm is None)
    forwarded, last_sent, kills = 0, 0.0, 0
    started = time.time()
    while True:
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            pass
        if deadline is not None and time.monotonic() >= deadline:
            signals.stop, deadline = True, None
        if slurm is not None and not signals.stop and (run_dir / CANCEL).exists():
            signals.stop = True  # `scancel --signal` does not always come back, or arrive, for an element of an array
        obeyed = bool(last_sent) and ((run_dir / PREEMPTED).exists() or is_finished(run_dir, started))
        if signals.stop and slurm is not None and not obeyed and time.monotonic() - last_sent >= 5.0:
            if not last_sent:
                say("asking all ranks to save and stop")
            slurm.signal_steps()
            last_sent = time.monotonic()
        elif signals.stop and slurm is None and signals.count > forwarded:
            if forwarded == 0:
                say("asking all ranks to save and stop; ask again to stop at once")
                child.send_signal(signal.SIGTERM)
            else:
                child.kill()
                kill_workers(run_dir)
            forwarded = signals.count
        if hang_s and not kills and time.time() - max(started, last_activity(run_dir)) > hang_s:
            say(f"nothing was written to {run_dir} for {hang_s:.0f} s: killing this attempt")
            kills += 1
            if slurm is not None:
                slurm.signal_steps("KILL")
            child.kill()
            kill_workers(run_dir)


def is_finished(run_dir: Path, since: float) -> bool:
    """Whether the trainer wrote that it is done (its last checkpoint is then published) after the time `since`."""
    return any(e.get("event") == "finished" and e.get("time", 0.0) >= since for e in read_jsonl(run_dir / "events.jsonl"))


def kill_workers(run_dir: Path) -> None:
    """Kill this run's ranks on this machine: torchrun gives each a session of its own, so they outlive a killed torchrun."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = b"CHATMILL_RUN_DIR=" + os.fsencode(run_dir) in variables
        if ours and any(variable.startswith(b"LOCAL_RANK=") for variable in variables):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(folder.name), signal.SIGKILL)


def own_output() -> str | None:
    """The file that this process prints to, if it is one."""
    try:
        target = Path("/proc/self/fd/1").readlink()
    except OSError:
        return None
    return str(target) if target.is_file() else None


def _sleep(seconds: float, signals: Signals) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not signals.stop:
        threading.Event().wait(0.1)


def describe_step(step: int) -> str:
    """`checkpoint at step 40`, or `no checkpoint yet`."""
    return f"checkpoint at step {step}" if step >= 0 else "no checkpoint yet"


def say(text: str) -> None:
    """One line with the time, at once."""
    print(f"[{time.strftime('%F %T')} launcher] {in_this_shell(text)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Parse the options before `--` and supervise the command after it."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.launcher.supervise", description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--max-no-progress", type=int, default=3)
    parser.add_argument("--lead", type=float, default=180.0, help="seconds before the time limit at which Slurm signals")
    parser.add_argument("--slurm", action="store_true", help="the command starts steps of this Slurm job (slurm/train.sh)")
    parser.add_argument("--hang", type=float, default=0.0, help="kill an attempt after this many silent seconds (0: never)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command after --")
    return supervise(options.run_dir, command, options.max_no_progress, options.lead, options.hang, options.slurm)


if __name__ == "__main__":
    sys.exit(main())
