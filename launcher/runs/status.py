"""`chatmill status | logs | cancel | resume`: runs wherever they are, from their own folders and one question to Slurm.

State comes from Slurm's queue (one squeue for all runs; sacct for jobs that the queue has forgotten, where it exists), from the
supervisor's process for runs on this machine, and from the run's own records.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from chatmill.config import ConfigError
from chatmill.processes import is_running
from chatmill.run_files import PREEMPTED, read_jsonl

from ..supervise.cause_page import PAGE
from ..supervise.first_cause import find_cause
from ..supervise.run_state import (
    CANCEL,
    Attempt,
    attempt_spans,
    attempts,
    last_activity,
    needed_lead_s,
    newest_step,
    seconds_per_step,
)

ACTIVE = ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "running")


@dataclass(frozen=True)
class RunStatus:
    """What `chatmill status` shows of one run. Times in seconds; goodput: time spent on steps that were kept / wall time
    of all attempts (waiting in a queue between them is not counted)."""

    run: str
    state: str
    detail: str
    step: int
    steps: int
    checkpoint: int
    loss: float | None
    seconds_per_step: float | None
    eta_s: float | None
    goodput: float | None
    attempts: int
    job: str
    nodes: str
    log: str
    cause: str | None


def status(names: Sequence[str], as_json: bool = False) -> int:
    """Print the state of runs; returns 1 when one of those named has failed."""
    folders = [find_run(name) for name in names] if names else all_runs(Path("runs"))
    if not folders:
        print("no runs below runs/; name their folders, or start one: chatmill launch RECIPE")
        return 0
    queue = query_slurm([job for folder in folders if (job := last_job(folder)).isdigit()])
    found = [describe(folder, queue) for folder in folders]
    if as_json:
        for one in found:
            print(json.dumps(asdict(one)))
    else:
        print("\n\n".join(show(one) for one in found))
    return int(bool(names) and any(one.state == "failed" for one in found))


def find_run(name: str) -> Path:
    """A run folder by its path, or by its name below runs/. Raises ConfigError."""
    for path in (Path(name), Path("runs") / name):
        if any((path / part).exists() for part in ("config.yaml", "launches", "logs")):
            return path.absolute()
    raise ConfigError(f"{name}: no run there (a run folder holds config.yaml). Runs here: {_names(all_runs(Path('runs')))}")


def all_runs(root: Path) -> list[Path]:
    """Run folders directly below root, by name."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if (path / "config.yaml").is_file() or (path / "launches").is_dir()]
    return sorted(path.absolute() for path in found)


def last_launch(run_dir: Path) -> dict[str, Any] | None:
    """The record of the newest `chatmill launch`, with its folder under "folder"; None for runs started by hand."""
    records = sorted((run_dir / "launches").glob("*/job.json"))
    if not records:
        return None
    record: dict[str, Any] = json.loads(records[-1].read_text(encoding="utf-8"))
    return record | {"folder": str(records[-1].parent)}


def last_job(run_dir: Path) -> str:
    """Slurm job id of the newest launch or attempt, `local-PID`, or "" when nothing is known."""
    launch, tried = last_launch(run_dir), attempts(run_dir)
    submitted = str(launch["job"]) if launch and launch.get("job") else ""
    if launch and submitted and (not tried or float(launch["time"]) > tried[-1].began):
        return submitted
    return tried[-1].job if tried else submitted


def query_slurm(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """State and reason by job id: one squeue for all, then one sacct for those it no longer knows. Empty without Slurm."""
    if not jobs or shutil.which("squeue") is None:
        return {}
    command = ["squeue", "-h", "--states=all", f"--user={getpass.getuser()}", "-o", "%A|%T|%r|%L|%N"]
    found: dict[str, tuple[str, str]] = {}
    for line in _lines(command):
        job, state, reason, left, nodes = line.split("|", 4)
        detail = f"{left} left on {nodes}" if state == "RUNNING" else reason.replace("None", "")
        found[job] = (state, detail)
    missing = [job for job in jobs if job not in found]
    if missing and shutil.which("sacct"):
        for line in _lines(["sacct", "-n", "-X", "-P", "-j", ",".join(missing), "-o", "JobIDRaw,State,ExitCode"]):
            job, state, code = line.split("|")
            found[job] = (state.split()[0], f"exit code {code}")
    return found


def _lines(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def describe(run_dir: Path, queue: dict[str, tuple[str, str]]) -> RunStatus:
    """Everything about one run that its folder and the queue say."""
    metrics = [line for line in read_jsonl(run_dir / "metrics.jsonl") if "loss" in line]
    tried, job = attempts(run_dir), last_job(run_dir)
    steps = _recipe_value(run_dir, "train", "steps") or 0
    step = int(metrics[-1]["step"]) if metrics else 0
    state, detail = _state(run_dir, tried, job, queue)
    step_s = seconds_per_step(run_dir)
    spans = attempt_spans(run_dir, active=state in ACTIVE)
    elapsed = sum(ended - began for began, ended in spans)
    last = tried[-1] if tried else None
    cause = None
    if state == "failed" and last is not None:
        found = find_cause(run_dir / "logs" / f"attempt-{last.number:03d}")
        page = run_dir / "logs" / f"attempt-{last.number:03d}" / PAGE
        cause = f"{found}\n{'':<14}{page if page.is_file() else found.log}" if found else last.cause
    return RunStatus(
        run=str(run_dir),
        state=state,
        detail=detail,
        step=step,
        steps=steps,
        checkpoint=newest_step(run_dir),
        loss=float(metrics[-1]["loss"]) if metrics else None,
        seconds_per_step=step_s,
        eta_s=(steps - step) * step_s if step_s is not None and state in ACTIVE else None,
        goodput=min(1.0, step * step_s / elapsed) if step_s and elapsed > 0 else None,
        attempts=len(spans),
        job=job,
        nodes=" ".join(last.nodes) if last else "",
        log=str(launcher_log(run_dir) or ""),
        cause=cause,
    )


def _state(run_dir: Path, tried: list[Attempt], job: str, queue: dict[str, tuple[str, str]]) -> tuple[str, str]:
    events = [e["event"] for e in read_jsonl(run_dir / "events.jsonl") if e.get("event") in ("start", "resume", "finished")]
    queued, detail = queue.get(job, ("", ""))
    if queued in ACTIVE:
        return queued, detail
    if tried and tried[-1].outcome is None and is_supervising(tried[-1]):
        return "running", f"process {tried[-1].lines.get('pid')}"
    if pid := training_process(run_dir):
        return "running", f"process {pid}, started by hand"
    if events and events[-1] == "finished":
        return "finished", ""
    if not tried:
        if queued:
            return ("failed", f"{queued} {detail}") if queued != "COMPLETED" else ("stopped", queued)
        if (run_dir / PREEMPTED).is_file():
            return "stopped", "by a signal, started by hand; the same command continues"
        mark = _process_mark(run_dir)
        if is_running(mark) is False:
            return "ended", f"process {mark['pid']}, started by hand, is gone; the same command continues"
        recent = bool(events) and time.time() - last_activity(run_dir) < 60
        return ("running", "started by hand") if recent else ("unknown", "started by hand on another machine; no records of it")
    outcome = tried[-1].outcome
    if outcome is None:
        return "killed", f"attempt {tried[-1].number} was killed with its supervisor {queued}".rstrip()
    if outcome == "failed":
        return "failed", f"exit code {tried[-1].code}"
    return "stopped", f"{outcome}; chatmill resume continues"


def is_supervising(attempt: Attempt) -> bool:
    """Whether the attempt's supervisor is alive on this machine."""
    if attempt.lines.get("host") != os.uname().nodename:
        return False
    try:
        command = Path(f"/proc/{attempt.lines['pid']}/cmdline").read_bytes()
    except (OSError, KeyError):
        return False
    return b"\0chatmill.launcher.supervise\0" in command


def training_process(run_dir: Path) -> int | None:
    """The process number of the run's rank 0, where it is alive on this machine."""
    mark = _process_mark(run_dir)
    return int(mark["pid"]) if is_running(mark) else None


def _process_mark(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["process"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def show(one: RunStatus) -> str:
    """One run for people."""
    lines = [f"{one.run}", f"  state       {one.state}{'  ' + one.detail if one.detail else ''}"]
    share = f" ({100 * one.step / one.steps:.0f} %)" if one.steps else ""
    lines.append(f"  step        {one.step:,} of {one.steps:,}{share}, " + _checkpoint(one.checkpoint))
    if one.loss is not None:
        rate = f", {one.seconds_per_step:.3g} s per step" if one.seconds_per_step else ""
        eta = f", {duration(one.eta_s)} left" if one.eta_s is not None else ""
        lines.append(f"  loss        {one.loss:.4f}{rate}{eta}")
    goodput = f", goodput {100 * one.goodput:.0f} %" if one.goodput is not None else ""
    place = (f", job {one.job}" if one.job else "") + (f" on {one.nodes}" if one.nodes else "")
    lines.append(f"  attempts    {one.attempts}{goodput}{place}")
    if one.log:
        lines.append(f"  log         {one.log}")
    if one.cause:
        lines.append(f"  first cause {one.cause}")
    return "\n".join(lines)


def _checkpoint(step: int) -> str:
    return f"checkpoint at {step:,}" if step >= 0 else "no checkpoint yet"


def duration(seconds: float) -> str:
    """Days, hours and minutes; seconds below an hour."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d}"


def launcher_log(run_dir: Path) -> Path | None:
    """The file the newest supervisor printed to."""
    named = [str(a.lines["log"]) for a in attempts(run_dir) if a.lines.get("log")]
    if named and Path(named[-1]).is_file():
        return Path(named[-1])
    found = [*run_dir.glob("logs/slurm-*.out"), *run_dir.glob("logs/launch-*.out")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def rank_logs(run_dir: Path, rank: int, attempt: int | None) -> list[Path]:
    """stdout.log and stderr.log of one rank. Raises ConfigError naming what there is."""
    folders = sorted((run_dir / "logs").glob("attempt-*")) if attempt is None else [run_dir / "logs" / f"attempt-{attempt:03d}"]
    places: dict[tuple[int, int], Path] = {}
    for file in folders[-1].glob("node-*/**/stdout.log") if folders else ():
        node = file.relative_to(folders[-1]).parts[0].removeprefix("node-")
        if node.isdigit() and file.parent.name.isdigit():
            places[int(node), int(file.parent.name)] = file.parent
    ordered = [places[key] for key in sorted(places)]
    if not 0 <= rank < len(ordered):
        where = folders[-1] if folders else run_dir / "logs"
        raise ConfigError(f"rank {rank}: {where} holds the output of {len(ordered)} rank(s)")
    return [ordered[rank] / "stdout.log", ordered[rank] / "stderr.log"]


def logs(name: str, *, rank: int | None, attempt: int | None, lines: int, follow: bool) -> int:
    """Print the last lines of the launcher's log or of one rank's output, and go on while the run is active."""
    run_dir = find_run(name)
    if rank is None and attempt is None:
        log = launcher_log(run_dir)
        if log is None:
            raise ConfigError(f"{run_dir}: no launcher's log yet; a job writes it when it starts (chatmill status {name})")
        files = [log]
    else:
        files = rank_logs(run_dir, rank or 0, attempt)
    positions: dict[Path, int] = {}
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as handle:
            last = deque(handle, maxlen=lines)
            positions[file] = handle.tell()
        if len(files) > 1 and last:
            print(f"== {file}")
        print("".join(last), end="", flush=True)
    while follow:
        active = describe(run_dir, query_slurm([last_job(run_dir)])).state in ACTIVE
        until = time.monotonic() + (10.0 if active else 0.0)  # Slurm is asked every ten seconds, the files twice a second
        while True:
            for file in files:
                with file.open(encoding="utf-8", errors="replace") as handle:
                    handle.seek(positions[file])
                    print(handle.read(), end="", flush=True)
                    positions[file] = handle.tell()
            if time.monotonic() >= until:
                break
            time.sleep(0.5)
        follow = active
    return 0


def cancel(name: str, *, now: bool) -> int:
    """Stop a run. It saves first unless `now`; a job that has not started is taken out of the queue."""
    run_dir = find_run(name)
    job, tried = last_job(run_dir), attempts(run_dir)
    if job.isdigit():
        state, _ = query_slurm([job]).get(job, ("", ""))
        if state not in ACTIVE:
            print(f"job {job} is not in the queue: nothing to cancel")
            return 0
        (run_dir / CANCEL).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / CANCEL).touch()
        array = tried[-1].lines.get("array") if tried else None
        if array:  # the wall times that have not begun yet would continue the run
            subprocess.run(["scancel", "--state=PENDING", str(array)], capture_output=True, check=False)
        gentle = state == "RUNNING" and not now
        command = ["scancel", "--batch", "--signal=USR1", job] if gentle else ["scancel", job]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"{' '.join(command)}: {done.stderr.strip()}")
        print(f"job {job}: asked to save and stop" if gentle else f"job {job} cancelled")
    elif tried and tried[-1].outcome is None and is_supervising(tried[-1]):
        supervisor = int(tried[-1].lines["pid"])
        os.kill(supervisor, signal.SIGTERM)
        if now:
            time.sleep(0.5)
            os.kill(supervisor, signal.SIGTERM)
        print(f"process {supervisor}: " + ("stopped" if now else "asked to save and stop"))
    elif pid := training_process(run_dir):
        os.kill(pid, signal.SIGKILL if now else signal.SIGTERM)
        print(
            f"process {pid}: " + ("stopped" if now else "asked to save and stop") + "\nthe command that started it continues it"
        )
        return 0
    else:
        print(f"{run_dir} is not running: nothing to cancel")
        return 0
    print(f"chatmill resume {name}   continues it")
    return 0


def resume(name: str, *, detach: bool) -> int:
    """Start a run again exactly as its newest launch did, code snapshot included; it goes on from its newest checkpoint."""
    from ..jobs.launch import next_commands, run_here, submit

    run_dir = find_run(name)
    record = last_launch(run_dir)
    if record is None:
        raise ConfigError(f"{run_dir} was not started by `chatmill launch`; the command that started it continues it")
    state = describe(run_dir, query_slurm([job] if (job := last_job(run_dir)).isdigit() else [])).state
    if state in ACTIVE:
        raise ConfigError(f"{run_dir} is {state}: nothing to resume")
    folder = Path(record["folder"])
    if record["on"] != "slurm":
        return run_here(folder, detach)
    command, needed = list(record["command"]), needed_lead_s(run_dir)
    if needed is not None:
        command.insert(-1, f"--signal=B:USR1@{max(60, math.ceil(needed))}")
    job = submit(command, cwd=Path(record["cwd"]))
    again = record | {"job": job, "time": round(time.time(), 3)}
    (folder / "job.json").write_text(json.dumps(again, indent=2) + "\n", encoding="utf-8")
    print(f"submitted as Slurm job {job}; then:\n{next_commands(run_dir)}")
    return 0


def _recipe_value(run_dir: Path, section: str, key: str) -> Any:
    for file in (run_dir / "config.yaml", *sorted(run_dir.glob("launches/*/config.yaml"), reverse=True)):
        if file.is_file():
            return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get(section, {}).get(key)
    return None


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:10]) or "none"
