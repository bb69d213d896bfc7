"""Adapters on every engine, on gloo: they follow the single process, and each goes on from what another saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatmill.trainer.checkpoint.checkpoint import Checkpoint

from ..ranks import run_in_ranks
from . import adapter_worker


@pytest.mark.slow
def test_two_processes_train_an_adapter_as_one_does(tiny_data: Path, base: Checkpoint, tmp_path: Path) -> None:
    text = run_in_ranks(adapter_worker.run, 2, (str(tiny_data), str(base.path)), tmp_path)
    assert all(f"passed {check.__name__}" in text for check in adapter_worker.CHECKS), text
