"""What the trainer writes into a run folder and the launcher reads there: names, whole checkpoints, JSON lines.

    list_checkpoints(run)  step_of(folder)  read_jsonl(run / "metrics.jsonl")  append_jsonl(run / "events.jsonl", {...})

Standard library only: the supervisor runs outside the container.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PREEMPTED = "PREEMPTED"  # left by a trainer that saved and stopped because of a signal
REFUSED = "refused"  # refused-*.json in $CHATMILL_LOGS, left by whoever refuses a start that would fail again
MANIFEST = "manifest.json"  # of a checkpoint; written last
_STEP_FOLDER = re.compile(r"step-(\d{8,})$")


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Published checkpoints of a run, oldest first (their contents are not checked)."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _STEP_FOLDER.match(p.name) and is_published(p)), key=step_of)


def is_published(checkpoint: Path) -> bool:
    """Whether a checkpoint was published there."""
    return (checkpoint / MANIFEST).is_file()


def step_of(checkpoint: Path) -> int:
    """40 of .../step-00000040."""
    return int(checkpoint.name.split("-")[1])


def read_jsonl(path: Path, damaged: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file, none if it is missing. A damaged line, cut short by a kill, is skipped.

    damaged: gets the skipped lines.
    """
    if not path.is_file():
        return
    for line in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            yield value
        elif damaged is not None:
            damaged.append(line)


def append_jsonl(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line. A missing folder is created."""
    append_text(path, json.dumps(values) + "\n")


def append_text(path: Path, text: str, synced: bool = False) -> None:
    """Append whole lines: all of them or, if the disk is full, nothing. synced: they are on the disk on return. Raises OSError.

    A last line without its end, left by a kill or a machine that went down, gets one: it would spoil the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as handle:
        size = handle.seek(0, os.SEEK_END)
        cut = size > 0 and os.pread(handle.fileno(), 1, size - 1) != b"\n"
        data = memoryview(("\n" * cut + text).encode())
        try:
            while data:
                data = data[handle.write(data) :]
            if synced:
                os.fsync(handle.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                handle.truncate(size)  # half a line would spoil the next one
            raise


def leave_refusal(message: str, environment: Mapping[str, str] = os.environ) -> None:
    """Tell the supervisor of this attempt, if there is one, that the same start would fail in the same way.

    An exit code cannot say so: torchrun and srun return codes of their own.
    """
    logs = environment.get("CHATMILL_LOGS")
    if not logs:
        return
    node = environment.get("GROUP_RANK") or environment.get("SLURM_NODEID") or "0"
    local_rank = environment.get("LOCAL_RANK", "0")
    place = {"node": int(node), "local_rank": int(local_rank)}
    with contextlib.suppress(OSError):
        path = Path(logs) / f"{REFUSED}-{node}-{local_rank}.json"
        path.write_text(json.dumps(place | {"message": message}), encoding="utf-8")
