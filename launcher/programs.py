"""What other programs answer: Slurm's commands, git, nvidia-smi. Standard library only."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


def output_of(command: Sequence[str], timeout_s: float = 60.0) -> str | None:
    """What a program prints, or None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="surrogateescape", timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
