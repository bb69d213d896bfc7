"""Hung ranks: who is to blame, where they stand, and that the group ends with that as its first cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from chatmill.launcher.supervise.first_cause import find_cause
from chatmill.run_files import read_jsonl
from chatmill.trainer.distributed.world import World
from chatmill.trainer.run.folder import RunFolder
from chatmill.trainer.run.watchdog import EXIT_CODE, Beat, Watchdog, blame

ROOT = Path(__file__).resolve().parents[3]


def beat(step: int, place: int, section: str = "update", tick: int = 1, waits: bool = True) -> Beat:
    return Beat(step, place, section, 1.0, tick, waits, "f (x.py:1)")


def test_a_rank_without_a_sign_of_life_is_blamed_first() -> None:
    before = {0: beat(7, 1, tick=4), 1: beat(7, 2, tick=9), 2: beat(7, 1, tick=3)}
    after = {0: beat(7, 1, tick=6), 1: beat(7, 2, tick=9), 2: beat(7, 1, tick=5)}
    assert blame(before, after, range(3), own=0)[0] == [1]
    assert "no sign of life" in blame(before, after, range(3), own=0)[1]
    assert blame({0: beat(7, 1)}, {0: beat(7, 1, tick=2)}, range(2), own=0)[0] == [1], "it never spoke at all"


def test_else_the_rank_that_is_furthest_behind() -> None:
    before = {0: beat(7, 1), 1: beat(6, 0, "data"), 2: beat(7, 1)}
    after = {rank: beat(b.step, b.place, b.section, 2, b.waits) for rank, b in before.items()}
    blamed, why = blame(before, after, range(3), own=2)
    assert blamed == [1]
    assert "`data` of step 6" in why


def test_else_the_rank_that_waits_for_no_one_and_else_all() -> None:
    before = {0: beat(7, 1), 1: beat(7, 1, waits=False)}
    after = {0: beat(7, 1, tick=2), 1: beat(7, 1, tick=2, waits=False)}
    assert blame(before, after, range(2), own=0)[0] == [1]
    after[1] = beat(7, 1, tick=2)
    blamed, why = blame(before, after, range(2), own=0)
    assert blamed == [0, 1]
    assert "network" in why


def test_a_thread_that_stands_still_is_reported_with_its_stack(tmp_path: Path) -> None:
    heard = threading.Event()
    messages: list[str] = []

    def on_hang(message: str) -> None:
        messages.append(message)
        heard.set()

    def stuck_in_here() -> None:
        assert heard.wait(120)

    folder = RunFolder(tmp_path)
    with Watchdog(World(0, 1, 0, 1, torch.device("cpu"), "none"), 0.3, folder, on_hang) as watchdog:
        watchdog.beat("data", 5)
        watchdog.beat("data", 6)
        stuck_in_here()
    assert "rank 0 stands in `data` of step 6" in messages[0]
    assert "stuck_in_here" in messages[0]
    assert "stuck_in_here" in (tmp_path / "logs" / "hang-rank-0.txt").read_text()
    (event,) = read_jsonl(tmp_path / "events.jsonl")
    assert (event["event"], event["ranks"], event["section"]) == ("hang", [0], "data")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_group_and_is_the_first_cause(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe("hung", parallel={"strategy": "ddp"}, train={"accumulation": 2, "hang_timeout_s": 8})
    logs = tmp_path / "logs"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=0"]
    command += [f"--log-dir={logs}/node-0", "--redirects=3", "-m", "chatmill.launcher.doctor.fault_injection", str(recipe)]
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "CHATMILL_FAULT": "sleep:1:5"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    run = tmp_path / "runs" / "hung"
    cause = find_cause(logs)
    assert cause is not None
    assert "rank 1" in cause.message
    assert "forward and backward" in cause.message
    assert "rank 0" not in cause.message
    assert "in forward_backward" in (run / "logs" / "hang-rank-1.txt").read_text()
    events = [e for e in read_jsonl(run / "events.jsonl") if e["event"] == "hang"]
    assert [e["ranks"] for e in events] == [[1]]
    assert json.loads((run / "logs" / "fault.json").read_text())["step"] == 5
    assert str(EXIT_CODE) in done.stderr
