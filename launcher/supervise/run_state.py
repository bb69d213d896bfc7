"""What a run folder says about its run, read with the standard library only, for login nodes and batch scripts.

    newest_step(run)  attempts(run)  needed_lead_s(run)

An attempt is one start of the whole group of processes. supervise.py writes a "begin" and an "end" line per attempt to
logs/attempts.jsonl; an attempt without an end was killed together with its supervisor (a lost node, kill -9).
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chatmill.run_files import list_checkpoints, read_jsonl, step_of

ATTEMPTS = "logs/attempts.jsonl"
CANCEL = "logs/cancel"  # left by `chatmill cancel`, with the job's id: the supervisor saves, stops and does not requeue


@dataclass(frozen=True)
class Attempt:
    """One start of the run's processes. Steps are those of the newest checkpoint; -1: there was none."""

    number: int
    job: str
    began: float
    step_before: int
    nodes: tuple[str, ...] = ()
    ended: float | None = None
    step_after: int | None = None
    outcome: str | None = None
    code: int | None = None
    cause: str | None = None
    permanent: bool = False
    lines: dict[str, Any] = field(default_factory=dict, repr=False)


def newest_step(run_dir: Path) -> int:
    """Step of the newest published checkpoint, or -1."""
    found = list_checkpoints(run_dir)
    return step_of(found[-1]) if found else -1


def attempt_logs(run_dir: Path, number: int) -> Path:
    """Folder of an attempt's logs."""
    return run_dir / "logs" / f"attempt-{number:03d}"


def attempts(run_dir: Path) -> list[Attempt]:
    """All attempts of a run, oldest first."""
    found: dict[int, Attempt] = {}
    for line in read_jsonl(run_dir / ATTEMPTS):
        number = int(line["attempt"])
        if line["event"] == "begin":
            found[number] = Attempt(
                number, str(line["job"]), float(line["time"]), int(line["step"]), tuple(line["nodes"]), lines=line
            )
        elif number in found:
            found[number] = replace(
                found[number],
                ended=float(line["time"]),
                step_after=int(line["step"]),
                outcome=str(line["outcome"]),
                code=line.get("code"),
                cause=line.get("cause"),
                permanent=bool(line.get("permanent")),
            )
    return [found[number] for number in sorted(found)]


def cancelled_job(run_dir: Path) -> str:
    """The job that `chatmill cancel` asked to stop, or ""."""
    try:
        return (run_dir / CANCEL).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def attempt_spans(run_dir: Path, *, active: bool) -> list[tuple[float, float]]:
    """When each attempt began and ended, oldest first, including those started by hand (the run's start and resume events).

    An attempt without a recorded end ended with its last record; the newest one of an active run lasts until now.
    """
    events = list(read_jsonl(run_dir / "events.jsonl"))
    tried = attempts(run_dir)
    known: list[tuple[float, float | None]] = [(a.began, a.ended) for a in tried]
    known += [(began, None) for began in begun_by_hand(events, tried)]
    known.sort(key=lambda span: span[0])
    written = [float(line["time"]) for line in (*events, *read_jsonl(run_dir / "metrics.jsonl")) if "time" in line]
    spans = []
    for (began, ended), (following, _) in itertools.zip_longest(known, known[1:], fillvalue=(math.inf, None)):
        if ended is None and active and following == math.inf:
            ended = time.time()
        last = max((t for t in written if began <= t < following), default=began)
        spans.append((began, last if ended is None else ended))
    return spans


def begun_by_hand(events: list[dict[str, Any]], tried: list[Attempt]) -> list[float]:
    """When a run was started without a supervisor, oldest first: its start and resume events that belong to no attempt.

    Version 0.1 named no attempt in an event. There the first event after an attempt began is taken as that attempt's own.
    """
    found, own = list[float](), set[int]()
    for event in events:
        if event.get("event") not in ("start", "resume") or event.get("attempt") in [a.number for a in tried]:
            continue
        at = float(event["time"])
        newest = next((a for a in reversed(tried) if a.began <= at), None)
        if newest is not None and newest.ended is None and "attempt" not in event and newest.number not in own:
            own.add(newest.number)
        elif newest is None or at > (newest.ended or -math.inf):
            found.append(at)
    return sorted(found)


def failures_without_progress(run_dir: Path, job: str) -> int:
    """How many of this job's latest attempts failed in a row without a newer checkpoint."""
    count = 0
    for attempt in reversed([a for a in attempts(run_dir) if a.job == job]):
        if attempt.outcome is None:
            continue  # killed from outside together with its supervisor: no verdict on the run
        if attempt.outcome == "finished" or (attempt.step_after is not None and attempt.step_after > attempt.step_before):
            break
        if attempt.outcome in ("failed", "preempted"):
            count += 1
    return count


def seconds_per_step(run_dir: Path) -> float | None:
    """Median over the last 50 metrics lines, or None before there are two."""
    steps = [line for line in read_jsonl(run_dir / "metrics.jsonl") if "loss" in line and line.get("tokens_per_s")]
    intervals = []
    for before, line in itertools.pairwise(steps):
        n = line["step"] - before["step"]
        if n > 0:
            intervals.append(line["tokens"] / line["tokens_per_s"] / n)
    return statistics.median(intervals[-50:]) if intervals else None


def needed_lead_s(run_dir: Path) -> float | None:
    """Seconds from the stop signal to a published checkpoint, from this run's records; None before the first save.

    Two steps, two of the longest saves (one may just have begun), the longest validation, and 30 s of slack.
    """
    step_s = seconds_per_step(run_dir)
    saves = [float(e["seconds"]) for e in read_jsonl(run_dir / "events.jsonl") if e.get("event") == "checkpoint"]
    if step_s is None or not saves:
        return None
    evaluations = [float(m.get("seconds", 0.0)) for m in read_jsonl(run_dir / "metrics.jsonl") if "eval" in m]
    return 2 * step_s + 2 * max(saves) + max(evaluations, default=0.0) + 30.0


def last_activity(run_dir: Path) -> float:
    """Time of the newest write to the run's records, or 0."""
    files = [run_dir / name for name in ("metrics.jsonl", "events.jsonl")] + [run_dir / "checkpoints"]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def now() -> float:
    """Wall-clock seconds, rounded to milliseconds as the records have them."""
    return round(time.time(), 3)
