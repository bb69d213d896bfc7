"""One page per failed attempt: the first cause with its stack, and what one would look up next to understand it.

    RUN/logs/attempt-002/first-cause.md

Written by the supervisor when the attempt has ended; `chatmill status RUN` names it. Standard library only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chatmill.run_files import read_jsonl
from chatmill.shell import own_command, typed

from .first_cause import Cause
from .run_state import Attempt, attempt_logs

PAGE = "first-cause.md"
STACK_LINES, EVENTS, STEPS, WIDTH = 40, 12, 8, 160


def write_page(run_dir: Path, attempt: Attempt, cause: Cause | None) -> Path | None:
    """Write the page of an attempt that failed; None if it cannot be written, which must not end the supervisor."""
    path = attempt_logs(run_dir, attempt.number) / PAGE
    try:
        path.write_text(render(run_dir, attempt, cause), encoding="utf-8")
    except OSError:
        return None
    return path


def render(run_dir: Path, attempt: Attempt, cause: Cause | None) -> str:
    """The page as Markdown that reads well as plain text too."""
    ended = attempt.ended or time.time()
    metrics = [m for m in read_jsonl(run_dir / "metrics.jsonl") if "loss" in m and m.get("time", 0.0) >= attempt.began]
    events = [e for e in read_jsonl(run_dir / "events.jsonl") if attempt.began <= e.get("time", 0.0) <= ended]
    reached = max((int(m["step"]) for m in metrics), default=max(0, attempt.step_before))
    saved = attempt.step_after if attempt.step_after is not None and attempt.step_after >= 0 else None
    kept = f"the newest checkpoint is of step {saved}" if saved is not None else "there is no checkpoint yet"
    lines = [
        f"# {run_dir.name}: attempt {attempt.number} failed (exit code {attempt.code})",
        "",
        f"first cause  {cause or 'no rank said why: killed from outside, or before Python began'}",
        f"when         {_clock(ended)}, {ended - attempt.began:.0f} s after the attempt began",
        f"where        {' '.join(attempt.nodes)}, job {attempt.job}",
        f"lost         steps up to {reached} were computed; {kept}",
        "",
    ]
    if cause is not None:
        lines += [f"## Its last words ({cause.log})", "", *_indented(_tail(cause.log, STACK_LINES)), ""]
    others = [file for file in sorted(cause.log.parent.parent.glob("*/stderr.log")) if file != cause.log] if cause else []
    if others:
        said = [f"rank {file.parent.name}: {(_tail(file, 1) or ['(nothing)'])[-1][:WIDTH]}" for file in others]
        lines += ["## The other ranks of that node, last line", "", *_indented(said), ""]
    if events:
        lines += ["## What happened before (events.jsonl)", "", *_indented(map(_event, events[-EVENTS:])), ""]
    if metrics:
        lines += ["## The last steps (metrics.jsonl)", "", *_indented(map(_step, metrics[-STEPS:])), ""]
    rank = f" --rank {cause.local_rank} --attempt {attempt.number}" if cause is not None and cause.node == 0 else ""
    program, run = own_command(), typed(run_dir)
    lines += ["## Next", "", f"    {program} logs {run}{rank}"]
    if metrics:
        lines += [f"    {program} data at {run} {reached + 1}        # what the step that did not end was to learn from"]
    lines += [f"    {program} resume {run}"]
    return "\n".join(lines) + "\n"


def _tail(file: Path, count: int) -> list[str]:
    try:
        with file.open(encoding="utf-8", errors="replace") as handle:
            return [line.rstrip() for line in deque((line for line in handle if line.strip()), maxlen=count)]
    except OSError:
        return []


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _event(event: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event") and not isinstance(v, dict | list))
    return f"{_clock(event['time'])}  {event.get('event')}: {rest}"[:WIDTH]


def _step(line: Mapping[str, Any]) -> str:
    norm = line.get("grad_norm")
    return f"step {line['step']}  loss {line['loss']:.4f}" + (f"  grad norm {norm:.3f}" if isinstance(norm, float) else "")


def _clock(seconds: float) -> str:
    return time.strftime("%F %T", time.localtime(seconds))
