"""Skips what this machine cannot run, with the reason."""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import settings

# The same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Tests are many small tensors in several processes: one thread each is fastest, and two cores are enough.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _why_not(item: pytest.Item) -> str | None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA GPU (make gpu)"
    if item.get_closest_marker("slurm") and shutil.which("slurmctld") is None:
        return "needs a local Slurm (tests/launcher/install_slurm.sh)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by marker; give each worker whole files, the longest first, and all that start a Slurm to one worker."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        reason = _why_not(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        group = "slurm" if item.get_closest_marker("slurm") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: 0 if item.get_closest_marker("slurm") else 1 if item.path in slow else 2)
