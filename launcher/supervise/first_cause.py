"""Why an attempt failed: the earliest error of any rank, not the last line of the loudest one.

When one rank dies, every other rank fails a moment later with a broken connection. torchrun's @record writes error.json with a
time for each rank that raised. A rank that was killed writes none; if all others only lost a connection, it is the cause.

A cause is permanent only if our own code said so, in the file that `leave_refusal` writes, never for what a program printed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatmill.run_files import REFUSED

_COLLATERAL = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "DistBackendError",
    "DistNetworkError",
    "failed to recv",
    "Broken pipe",
)


@dataclass(frozen=True)
class Cause:
    """A rank's error. permanent: the same start would fail in the same way (the recipe or the data is wrong)."""

    node: int
    local_rank: int
    message: str
    log: Path
    permanent: bool = False

    def __str__(self) -> str:
        return f"node {self.node}, local rank {self.local_rank}: {self.message}"


def find_cause(logs: Path) -> Cause | None:
    """The first error among the ranks' logs below logs/node-*/, or None when no rank said anything."""
    raised: list[tuple[bool, float, Cause]] = []
    for file in logs.glob("node-*/**/error.json"):
        details = _error(file)
        if details is not None:
            message, seconds = details
            node, local_rank = _place(file, logs)
            cause = Cause(node, local_rank, message, file.with_name("stderr.log"))
            raised.append((_only_lost_others(message), seconds, cause))
    refused = [c for file in sorted(logs.glob(f"{REFUSED}-*.json")) if (c := _refusal(file, logs)) is not None]
    if refused:
        return refused[0]
    spoken = [c for file in sorted(logs.glob("node-*/**/stderr.log")) if (c := _last_words(file, logs)) is not None]
    if raised:
        collateral, _, first = min(raised, key=lambda item: item[:2])
        silent = _silent_ranks(logs, {(cause.node, cause.local_rank) for *_, cause in raised})
        if collateral and silent:
            return silent[0]
        return first
    return min(spoken, key=lambda cause: _only_lost_others(cause.message), default=None)


def _only_lost_others(message: str) -> bool:
    return any(word in message for word in _COLLATERAL)


def _silent_ranks(logs: Path, raised: set[tuple[int, int]]) -> list[Cause]:
    message = "killed from outside (or crashed below Python): it left no error, the other ranks only lost their connection"
    files = [file for file in logs.glob("node-[0-9]*/**/stderr.log") if "-" not in _node(file, logs)]
    silent = sorted((place, file) for file in files if (place := _place(file, logs)) not in raised)
    return [Cause(*place, message, file) for place, file in silent]


def _error(file: Path) -> tuple[str, float] | None:
    try:
        message: Any = json.loads(file.read_text(encoding="utf-8"))["message"]
        if isinstance(message, str):
            return message.strip().splitlines()[-1], 0.0
        return str(message["message"]).strip().splitlines()[-1], float(message["extraInfo"]["timestamp"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _refusal(file: Path, logs: Path) -> Cause | None:
    try:
        left: Any = json.loads(file.read_text(encoding="utf-8"))
        node, local_rank, message = int(left["node"]), int(left["local_rank"]), " ".join(str(left["message"]).split())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    spoken = sorted(logs.glob(f"node-{node}/**/{local_rank}/stderr.log"))
    return Cause(node, local_rank, message, spoken[-1] if spoken else file, permanent=True)


def _last_words(file: Path, logs: Path) -> Cause | None:
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ("Error" in line or line.startswith("error: ")) and not line.startswith("[W")]
    return Cause(*_place(file, logs), errors[-1], file) if errors else None


def _place(file: Path, logs: Path) -> tuple[int, int]:
    node = int(_node(file, logs).partition("-")[0])
    return node, int(file.parent.name) if file.parent.name.isdigit() else 0


def _node(file: Path, logs: Path) -> str:
    """`3` of .../node-3/..., or `3-preflight`."""
    return file.relative_to(logs).parts[0].removeprefix("node-")
