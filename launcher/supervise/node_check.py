"""Is this node fit to take part? Run on every node before the processes start; exit code 78 says no, and why.

    python -m chatmill.launcher.supervise.node_check --gpus 8 --processes 8 --folder runs/x

A node that fails leaves $CHATMILL_LOGS/bad-node-NAME with the reason; the supervisor then asks Slurm for other nodes. A site
can add its own test with CHATMILL_NODE_CHECK=/path/to/program (exit code 0: the node is good). A step that was given fewer GPUs
than it has processes is refused for good: the next attempt would get as few. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path

from chatmill.run_files import leave_refusal

from ..programs import visible_gpus

BAD_NODE = 78
LEAST_FREE_BYTES = 1 << 30


def findings(folder: Path, gpus: int, own_check: str | None) -> list[str]:
    """What is wrong with this node, one line each; empty when it is good."""
    found = [_writable(folder)]
    if gpus and shutil.which("nvidia-smi"):
        found += _gpus(gpus)
    if own_check:
        done = subprocess.run([own_check], capture_output=True, text=True, check=False)
        if done.returncode:
            found.append(f"{own_check}: exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-400:]}")
    return [line for line in found if line]


def missing_gpus(processes: int, visible: str | None) -> str:
    """Why this step cannot start one process per GPU, or "". visible: CUDA_VISIBLE_DEVICES, or None where it is not set."""
    shown = visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) if visible is not None else None
    if shown is None or shown >= processes:
        return ""
    return (
        f"this step sees {shown} GPUs (CUDA_VISIBLE_DEVICES={visible}) for {processes} processes.\n"
        "Ask for whole nodes' GPUs with --gpus-per-node=N, without --gpu-bind and without options per task"
    )


def _writable(folder: Path) -> str:
    probe = folder / f".node-check-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        return f"cannot write to {folder}: {error.strerror}. Is it on a file system that every node sees?"
    free = shutil.disk_usage(folder).free
    return "" if free >= LEAST_FREE_BYTES else f"{folder}: {free / 1e9:.2f} GB free, a checkpoint may not fit"


def _gpus(expected: int) -> list[str]:
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not answer: {error}"]
    if done.returncode:
        return [f"nvidia-smi failed: {(done.stdout + done.stderr).strip()[-300:]}"]
    rows = [line.split(",") for line in done.stdout.splitlines() if "," in line]
    found = [f"{len(rows)} of {expected} GPUs answer"] if len(rows) < expected else []
    bad = [(i.strip(), n.strip()) for i, n in rows if n.strip() not in ("0", "[N/A]")]
    return found + [f"GPU {i}: {n} uncorrected memory errors" for i, n in bad]


def main(arguments: list[str] | None = None) -> int:
    """Check, report on stderr and in a file; returns 0 or 78."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.launcher.supervise.node_check")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.gpus and (short := missing_gpus(options.processes, os.environ.get("CUDA_VISIBLE_DEVICES"))):
        print(f"error: {short}", file=sys.stderr, flush=True)
        leave_refusal(short)
        return BAD_NODE
    problems = findings(options.folder, options.gpus, os.environ.get("CHATMILL_NODE_CHECK"))
    if not problems:
        return 0
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    text = "\n".join(problems)
    print(f"node {name} is not fit: {text}", file=sys.stderr, flush=True)
    logs = os.environ.get("CHATMILL_LOGS")
    if logs:
        try:
            (Path(logs) / f"bad-node-{name}").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            print(f"node {name}: this could not be recorded: {error.strerror}", file=sys.stderr, flush=True)
    return BAD_NODE


if __name__ == "__main__":
    sys.exit(main())
