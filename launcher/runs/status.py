"""`chatmill status`: the state of runs wherever they are, from their own folders and one query to Slurm.

State comes from Slurm's queue (one squeue for all runs; sacct for jobs that the queue has forgotten, where it exists), from the
supervisor's process for runs on this machine, and from the run's own records.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from chatmill.config import ConfigError, read_json, read_yaml
from chatmill.formatting import duration
from chatmill.processes import is_running, process_mark
from chatmill.run_files import PREEMPTED, read_jsonl
from chatmill.shell import in_this_shell, typed

from ..programs import output_of
from ..supervise.cause_page import PAGE
from ..supervise.first_cause import find_cause
from ..supervise.run_state import (
    Attempt,
    attempt_logs,
    attempt_spans,
    attempts,
    begun_by_hand,
    last_activity,
    newest_step,
    seconds_per_step,
)

DAMAGED = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError)
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
    """Print the state of runs; returns 2 where nothing can be said of one, 1 when one of those named has failed."""
    folders = [find_run(name) for name in names] if names else all_runs(Path("runs"))
    if not folders:
        print(in_this_shell("no runs below runs/; name their folders, or start one: chatmill launch RECIPE"))
        return 0
    found, problems = describe_all(folders)
    if as_json:
        for one in found:
            print(json.dumps(asdict(one)))
    else:
        print(in_this_shell("\n\n".join(show(one) for one in found)))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else int(bool(names) and any(one.state == "failed" for one in found))


def describe_all(folders: Sequence[Path]) -> tuple[list[RunStatus], list[str]]:
    """(what is known of the runs, why nothing can be said of the others, whose records are damaged)."""
    jobs, found, problems = list[str](), list[RunStatus](), list[str]()
    for folder in folders:
        with suppress(ConfigError, OSError, *DAMAGED):  # describe says it
            jobs.append(last_job(folder))
    queue = query_slurm(jobs)
    for folder in folders:
        try:
            found.append(describe(folder, queue))
        except (ConfigError, OSError) as error:
            problems.append(str(error))
    return found, problems


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
    return read_json(records[-1]) | {"folder": str(records[-1].parent)}


def last_job(run_dir: Path) -> str:
    """Slurm job id of the newest launch or attempt (of a chain: its array's), `local-PID`, or "" when nothing is known."""
    launch, tried = last_launch(run_dir), attempts(run_dir)
    submitted = str(launch["job"]) if launch and launch.get("job") else ""
    if launch and submitted and (not tried or float(launch["time"]) > tried[-1].began):
        return submitted
    return str(tried[-1].lines.get("array") or tried[-1].job) if tried else submitted


def query_slurm(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """State and reason by Slurm job id: one squeue, then one sacct for the jobs it no longer knows. Empty without Slurm.

    A job array has the state of the element that is furthest: one that runs, else one that waits, else the last that ended.
    """
    jobs = [job for job in jobs if job.isdigit()]
    if not jobs:
        return {}
    command = ["squeue", "-h", "--states=all", f"--user={getpass.getuser()}", "-o", "%A|%F|%T|%r|%L|%N"]
    found: dict[str, tuple[str, str]] = {}
    for line in (output_of(command) or "").splitlines():
        job, array, state, reason, left, nodes = line.split("|", 5)
        detail = f"{left} left on {nodes}" if state == "RUNNING" else reason.replace("None", "")
        for name in {job, array}:
            if name not in found or _rank(state) <= _rank(found[name][0]):
                found[name] = (state, detail)
    missing = [job for job in jobs if job not in found]
    if missing:
        command = ["sacct", "-n", "-X", "-P", "-j", ",".join(missing), "-o", "JobIDRaw,JobID,State,ExitCode"]
        for line in (output_of(command) or "").splitlines():
            job, shown, state, code = line.split("|")
            for name in {job, shown.partition("_")[0]}:
                found[name] = (state.split()[0], f"exit code {code}")
    return found


def _rank(state: str) -> int:
    """How far a job is from its end: 0 for one that runs."""
    return ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED", "PENDING", state).index(state)


def describe(run_dir: Path, queue: dict[str, tuple[str, str]]) -> RunStatus:
    """Everything about one run that its folder and the queue say. Raises ConfigError for a folder with damaged records."""
    try:
        return _describe(run_dir, queue)
    except ConfigError:
        raise
    except DAMAGED as error:
        raise ConfigError(
            f"{run_dir}: its records are damaged, or not a run's ({type(error).__name__}: {error}). Look at metrics.jsonl, "
            "environment.json, config.yaml, launches/ and logs/ in it."
        ) from error


def _describe(run_dir: Path, queue: dict[str, tuple[str, str]]) -> RunStatus:
    metrics = [line for line in read_jsonl(run_dir / "metrics.jsonl") if "loss" in line]
    tried, job = attempts(run_dir), last_job(run_dir)
    steps = int(_recipe_value(run_dir, "train", "steps") or 0)
    step = int(metrics[-1]["step"]) if metrics else 0
    state, detail = _state(run_dir, tried, job, queue)
    step_s = seconds_per_step(run_dir)
    spans = attempt_spans(run_dir, active=state in ACTIVE)
    elapsed = sum(ended - began for began, ended in spans)
    last = tried[-1] if tried else None
    cause = None
    if state == "failed" and last is not None:
        folder = attempt_logs(run_dir, last.number)
        found, page = find_cause(folder), folder / PAGE
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


def current_state(run_dir: Path) -> str:
    """The state of one run, given what Slurm says."""
    return describe(run_dir, query_slurm([last_job(run_dir)])).state


def _state(run_dir: Path, tried: list[Attempt], job: str, queue: dict[str, tuple[str, str]]) -> tuple[str, str]:
    records = [e for e in read_jsonl(run_dir / "events.jsonl") if e.get("event") in ("start", "resume", "finished")]
    events = [e["event"] for e in records]
    queued, detail = queue.get(job, ("", ""))
    if queued in ACTIVE:
        return queued, detail
    if mark := supervisor(run_dir):
        return "running", f"process {mark['pid']}"
    if mark := training_process(run_dir):
        return "running", f"process {mark['pid']}, started by hand"
    if events and events[-1] == "finished":
        return "finished", ""
    by_hand = begun_by_hand(records, tried)
    if not tried or (by_hand and by_hand[-1] > (tried[-1].ended or tried[-1].began)):
        if queued and not tried:
            return ("failed", f"{queued} {detail}") if queued != "COMPLETED" else ("stopped", queued)
        if (run_dir / PREEMPTED).is_file():
            return "stopped", "by a signal, started by hand; the same command continues"
        left = _process_mark(run_dir)
        if is_running(left) is False:
            return "ended", f"process {left['pid']}, started by hand, is gone; the same command continues"
        recent = bool(events) and time.time() - last_activity(run_dir) < 60
        return ("running", "started by hand") if recent else ("unknown", "started by hand on another machine; no records of it")
    outcome = tried[-1].outcome
    if outcome is None:
        return "killed", f"attempt {tried[-1].number} was killed with its supervisor {queued}".rstrip()
    if outcome == "failed":
        return "failed", f"exit code {tried[-1].code}"
    return "stopped", f"{outcome}; chatmill resume {typed(run_dir)} continues"


def supervisor(run_dir: Path) -> dict[str, Any] | None:
    """The mark of the process that supervises the run's newest attempt, if it is alive on this machine."""
    tried = attempts(run_dir)
    if not tried or tried[-1].outcome is not None:
        return None
    mark = tried[-1].lines.get("process") or _mark_of_old_record(tried[-1], run_dir)
    return mark if is_running(mark) else None


def _mark_of_old_record(attempt: Attempt, run_dir: Path) -> dict[str, Any] | None:
    """Version 0.1 recorded only a number: it is the supervisor's if that process supervises this very folder."""
    if attempt.lines.get("host") != os.uname().nodename:
        return None
    try:
        words = psutil.Process(attempt.lines["pid"]).cmdline()
    except (psutil.Error, KeyError):
        return None
    ours = "chatmill.launcher.supervise" in words and any(Path(word).resolve() == run_dir.resolve() for word in words)
    return process_mark(attempt.lines["pid"]) if ours else None


def training_process(run_dir: Path) -> dict[str, Any] | None:
    """The mark of the run's rank 0, if it is alive on this machine."""
    mark = _process_mark(run_dir)
    return mark if is_running(mark) else None


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


def launcher_log(run_dir: Path) -> Path | None:
    """The file the newest supervisor printed to."""
    named = [str(a.lines["log"]) for a in attempts(run_dir) if a.lines.get("log")]
    if named and Path(named[-1]).is_file():
        return Path(named[-1])
    found = [*run_dir.glob("logs/slurm-*.out"), *run_dir.glob("logs/launch-*.out")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _recipe_value(run_dir: Path, section: str, key: str) -> Any:
    for file in (run_dir / "config.yaml", *sorted(run_dir.glob("launches/*/config.yaml"), reverse=True)):
        if file.is_file():
            return (read_yaml(file, empty={}).get(section) or {}).get(key)
    return None


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:10]) or "none"
