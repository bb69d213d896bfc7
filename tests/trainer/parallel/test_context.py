"""Context parallelism: what ranks that divide a pack compute together equals what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.trainer.parallel.context_worker import CASES, attention_parity, compiled_layers, engine_parity, long_dialogue
from tests.trainer.ranks import run_in_ranks


def test_attention_of_divided_packs_equals_that_of_whole_ones(tmp_path: Path) -> None:
    assert "largest difference" in run_in_ranks(attention_parity, 4, (str(tmp_path),), tmp_path)


def test_steps_of_divided_batches_equal_those_of_one_process(tmp_path: Path) -> None:
    printed = run_in_ranks(engine_parity, 4, (str(tmp_path),), tmp_path)
    assert all(f"{name}: loss" in printed for name in (*CASES, "DPO, ulysses", "DPO, ring"))


@pytest.mark.exhaustive  # pairs of 131,072 tokens take a minute
def test_a_dialogue_of_131072_tokens_is_trained_by_two_processes(tmp_path: Path) -> None:
    assert "131,072 tokens: loss" in run_in_ranks(long_dialogue, 2, (str(tmp_path),), tmp_path, timeout_s=1800)


@pytest.mark.exhaustive  # compiling takes a minute
def test_compiled_layers_of_divided_batches_equal_those_that_are_not(tmp_path: Path) -> None:
    assert run_in_ranks(compiled_layers, 2, (str(tmp_path),), tmp_path).count("compiled") >= 8
