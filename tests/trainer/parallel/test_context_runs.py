"""A whole run whose processes divide its batches: guard, validation, averaged weights, adapter and record as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.trainer.ranks import train_in_ranks

from chatmill.data.packing.usage import at
from chatmill.run_files import read_jsonl


@pytest.mark.slow
@pytest.mark.exhaustive  # the parts are in test_context.py
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_a_run_that_is_rolled_back_follows_that_of_one_process(write_recipe: Any, tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {
        "train": {"steps": 8, "ema": 0.9},
        "checkpoint": {"every_steps": 2, "asynchronous": False},
        "evaluation": {"every_steps": 4, "ema": True, "prompts": ["hi"], "max_new_tokens": 4},
        "guard": {"on_nan": "rollback"},
    }
    for name, processes, overrides in (
        ("one", 1, ()),
        ("two", 2, ("parallel.strategy=fsdp2", "parallel.context=2", f"parallel.context_method={method}")),
    ):
        launched = overrides or ("parallel.strategy=ddp",)
        train_in_ranks(write_recipe(name, **options), processes, *launched, fault=f"nan:{processes - 1}:5")
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for kind, keys in (("loss", ("tokens", "total_tokens", "loss_tokens")), ("eval", ()), ("eval_ema", ())):
        lines = [[line for line in read_jsonl(run / "metrics.jsonl") if kind in line] for run in (one, two)]
        assert len(lines[0]) == len(lines[1]) > 0
        for mine, theirs in zip(*lines, strict=True):
            assert [mine[key] for key in ("step", *keys)] == [theirs[key] for key in ("step", *keys)]
            if kind == "loss":
                assert (mine["loss"], mine["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=2e-5)
            else:
                assert mine[kind] == pytest.approx(theirs[kind], rel=2e-5)
    records = [
        [e for e in read_jsonl(run / "events.jsonl") if e["event"] in ("skipped_step", "rollback")] for run in (one, two)
    ]
    for mine, theirs in zip(*records, strict=True):
        assert all(mine[key] == theirs[key] for key in mine.keys() - {"time", "value"})
    assert [at(one, step) for step in range(1, 9)] == [at(two, step) for step in range(1, 9)]
