"""What other programs answer (Slurm's commands, git, nvidia-smi) and the processor. Standard library only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def output_of(command: Sequence[str], timeout_s: float = 60.0) -> str | None:
    """What a program prints, or None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="surrogateescape", timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many GPUs a process here would see, or None where nothing says so. Of several MIG slices CUDA shows one."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
        return min(len(names), 1) if any(name.startswith("MIG-") for name in names) else len(names)
    listed = output_of(["nvidia-smi", "-L"])
    return None if listed is None else sum(line.startswith("GPU ") for line in listed.splitlines())


# bf16 matrix products are slow without these.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bf16 matrices itself (unknown systems: no)."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and _BF16_FLAGS & set(line.split()) for line in lines)
