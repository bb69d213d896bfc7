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
    """Skip by marker."""
    for item in items:
        reason = _why_not(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
