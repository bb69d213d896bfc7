"""kill -9 at a random step, and on with another engine and world size: the uninterrupted run's curve, token for token.

The steps are drawn with a fixed seed. `chatmill doctor --faults --only moved` does it under torchrun and the supervisor,
at another step each time.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from chatmill.launcher.doctor.fault_injection import Fault, install
from chatmill.run_files import read_jsonl
from chatmill.trainer.checkpoint import saver as checkpoint_saver
from chatmill.trainer.config import load_recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.torch_engine import TorchEngine
from chatmill.trainer.engine.zero import ZeroEngine
from chatmill.trainer.loop import validation
from chatmill.trainer.loop.checkpoints import RunCheckpoints
from chatmill.trainer.loop.loop import train

from ..ranks import train_in_ranks

STEPS, EVERY = 12, 2


def curve(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


# processes and overrides of each attempt; the last one is a single process
SHARDED = (4, "parallel.strategy=fsdp2", "train.accumulation=1")
MOVES = [
    ((2, "parallel.strategy=ddp", "parallel.context=2", "train.accumulation=4"), SHARDED),
    pytest.param(((2, "parallel.strategy=ddp", "train.accumulation=2"), SHARDED), marks=pytest.mark.exhaustive),
    pytest.param(
        (
            (2, "parallel.strategy=fsdp2", "parallel.context=2", "train.accumulation=4"),
            (2, "parallel.strategy=fsdp2", "train.accumulation=2"),
        ),
        marks=pytest.mark.exhaustive,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("attempts", MOVES, ids=["divided batches", "whole batches", "divided, then sharded"])
def test_a_killed_run_goes_on_with_another_engine_and_world_size_as_if_nothing_had_happened(
    write_recipe, tmp_path: Path, attempts: tuple[tuple[Any, ...], ...]
) -> None:
    options: dict[str, Any] = {
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": EVERY, "asynchronous": False},  # what a kill loses is then known
        "evaluation": {"at_end": False},
    }
    train(load_recipe(str(write_recipe("whole", **options))))
    first, second = sorted(random.Random(7).sample(range(EVERY + 2, STEPS), 2))
    assert second - first > EVERY, "the second attempt must get further than the first"
    recipe, run = write_recipe("moved", **options), tmp_path / "runs" / "moved"
    for step, (processes, *overrides) in zip((first, second), attempts, strict=True):
        with pytest.raises(AssertionError, match=r"rank \d ended with"):
            train_in_ranks(recipe, processes, *overrides, fault=f"kill:{processes - 1}:{step}")
        killed = json.loads((run / "logs" / "fault.json").read_text())
        assert (killed["kind"], killed["step"]) == ("kill", step)
        (run / "logs" / "fault.json").unlink()
    assert train(load_recipe(str(recipe))) == STEPS
    found, wanted = curve(run), curve(tmp_path / "runs" / "whole")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for name in ("tokens", "loss_tokens", "total_tokens", "lr"):
        assert [line[name] for line in found] == [line[name] for line in wanted], name
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in wanted], rel=2e-5), name
    resumed = [e for e in read_jsonl(run / "events.jsonl") if e["event"] == "resume"]
    began = [(step - 1) // EVERY * EVERY for step in (first, second)]
    assert [(e["strategy"], e["world_size"], e["step"]) for e in resumed] == [
        ("fsdp2", attempts[1][0], began[0]), ("single", 1, began[1])
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [TorchEngine, ZeroEngine])
def test_a_fault_happens_under_every_engine(kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in [
        (TorchEngine, "forward_backward"),
        (ZeroEngine, "forward_backward"),
        (RunCheckpoints, "restore"),
        (validation, "evaluate"),
        (checkpoint_saver, "write_shares"),
    ]:
        monkeypatch.setattr(owner, name, lambda *arguments: "done")  # and put back what install() replaces
    install(Fault("raise:1:2", tmp_path))
    engine = kind.__new__(kind)
    engine.world = World(1, 2, 1, 2, torch.device("cpu"), "gloo")
    assert engine.forward_backward([]) == "done"
    with pytest.raises(RuntimeError, match="injected error"):
        engine.forward_backward([])
