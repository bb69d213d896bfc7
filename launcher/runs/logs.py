"""`chatmill logs`: what the launcher or one rank of a run printed."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from chatmill.config import ConfigError
from chatmill.formatting import counted

from ..supervise.run_state import attempt_logs
from .status import ACTIVE, current_state, find_run, launcher_log


def rank_logs(run_dir: Path, rank: int, attempt: int | None) -> list[Path]:
    """stdout.log and stderr.log of one rank. Raises ConfigError naming what there is."""
    folders = sorted((run_dir / "logs").glob("attempt-*")) if attempt is None else [attempt_logs(run_dir, attempt)]
    places: dict[tuple[int, int], Path] = {}
    for file in folders[-1].glob("node-*/**/stdout.log") if folders else ():
        node = file.relative_to(folders[-1]).parts[0].removeprefix("node-")
        if node.isdigit() and file.parent.name.isdigit():
            places[int(node), int(file.parent.name)] = file.parent
    ordered = [places[key] for key in sorted(places)]
    if not 0 <= rank < len(ordered):
        where = folders[-1] if folders else run_dir / "logs"
        raise ConfigError(f"rank {rank}: {where} holds the output of {counted(len(ordered), 'rank')}")
    return [ordered[rank] / "stdout.log", ordered[rank] / "stderr.log"]


def logs(name: str, *, rank: int | None, attempt: int | None, lines: int, follow: bool) -> int:
    """Print the last lines of the launcher's log or of one rank's output, and continue while the run is active."""
    run_dir = find_run(name)
    if rank is None and attempt is None:
        log = launcher_log(run_dir)
        if log is None:
            raise ConfigError(f"{run_dir}: no launcher log yet; a job writes it when it starts (chatmill status {name})")
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
        active = current_state(run_dir) in ACTIVE
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
