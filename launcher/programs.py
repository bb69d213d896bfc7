"""What other programs answer (Slurm's commands, git, nvidia-smi), and how this one is called. Standard library only."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
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


def own_command(activated: bool = False) -> str:
    """How `chatmill` is called in this shell: by its name where the shell finds this very program, else by its path.

    activated: after the line that `activation` gives.
    """
    script = Path(sys.executable).with_name("chatmill")
    found = shutil.which("chatmill")
    if found is not None and os.path.realpath(found) == os.path.realpath(script):
        return "chatmill"
    if activated and activation():
        return "chatmill"
    if script.is_file():
        return shlex.quote(_near(script))
    return f"{shlex.quote(_near(Path(sys.executable)))} -m chatmill"


def activation() -> str | None:
    """The line that lets the shell find `chatmill`; None where it does already, or where no environment can be activated."""
    script = Path(sys.executable).with_name("chatmill")
    found = shutil.which("chatmill")
    if found is not None and os.path.realpath(found) == os.path.realpath(script):
        return None
    shell = Path(os.environ.get("SHELL", "")).name
    activate = script.with_name({"fish": "activate.fish", "csh": "activate.csh", "tcsh": "activate.csh"}.get(shell, "activate"))
    return f"source {shlex.quote(_near(activate))}" if script.is_file() and activate.is_file() else None


def _near(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


# bf16 matrix products are slow without these.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bf16 matrices itself (unknown systems: no)."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and _BF16_FLAGS & set(line.split()) for line in lines)
