"""Skips what this machine cannot run, with the reason."""

from __future__ import annotations

import functools
import os
import shutil
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Tests are many small tensors in several processes: one thread each is fastest, and two cores are enough.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--exhaustive."""
    parser.addoption("--exhaustive", action="store_true", help="run the tests marked exhaustive, too")


def _why_not(item: pytest.Item) -> str | None:
    if item.get_closest_marker("exhaustive") and not item.config.getoption("--exhaustive"):
        return "long; make test ARGS=--exhaustive runs it"
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA GPU (make gpu)"
    if item.get_closest_marker("slurm") and shutil.which("slurmctld") is None:
        return "needs a local Slurm (tests/launcher/install_slurm.sh)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by marker. Files that start a Slurm come first, then those with slow tests: none of them is left for the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    slurm = {item.path for item in items if item.get_closest_marker("slurm")}
    for item in items:
        reason = _why_not(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: 0 if item.path in slurm else 1 if item.path in slow else 2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers get whole files, so that fixtures of a file are made once; all files that start a Slurm go to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "slurm" if starts_slurm(file) else file

    @functools.cache
    def starts_slurm(file: str) -> bool:
        return "pytest.mark.slurm" in (config.rootpath / file).read_text(encoding="utf-8")

    config.option.loadscopereorder = False  # longest first, as sorted above
    return ByFile(config, log)
