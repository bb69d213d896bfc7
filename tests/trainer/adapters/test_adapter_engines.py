"""Adapters on every engine, on gloo: they follow the single process, and each goes on from what another saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatmill.trainer.checkpoint.checkpoint import Checkpoint

from ..ranks import run_in_ranks
from . import adapter_worker

IN_CI = ("every_engine_follows_one_process", "a_quantised_base_is_sharded_and_follows_one_process")
LONGER = tuple(check.__name__ for check in adapter_worker.CHECKS if check.__name__ not in IN_CI)


@pytest.mark.slow
@pytest.mark.parametrize("names", [IN_CI, pytest.param(LONGER, marks=pytest.mark.exhaustive)], ids=["ci", "longer"])
def test_two_processes_train_an_adapter_as_one_does(
    names: tuple[str, ...], tiny_data: Path, base: Checkpoint, tmp_path: Path
) -> None:
    text = run_in_ranks(adapter_worker.run, 2, (str(tiny_data), str(base.path), names), tmp_path)
    assert all(f"passed {name}" in text for name in names), text
