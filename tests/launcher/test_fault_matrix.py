"""The fault matrix itself: two rows for real, and that a loss would be seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatmill.launcher import fault_matrix
from chatmill.launcher.fault_matrix import EVERY, Bench, Row, main


@pytest.mark.slow
def test_kill_minus_nine_loses_nothing_and_another_engine_and_world_size_go_on(tmp_path: Path, capsys) -> None:
    assert main(["--only", "kill,moved", "--seed", "3", "--out", str(tmp_path / "table.json")]) == 0
    assert "2 faults; nothing was lost in any" in capsys.readouterr().out
    killed, moved = json.loads((tmp_path / "table.json").read_text())
    assert killed["kept"] and moved["kept"]
    assert killed["steps_lost"] in (2, 6), "the checkpoint of step 4, or where it was still being written none"
    assert "local rank 1" in killed["detected"]
    step = int(moved["fault"].split()[5])
    assert moved["steps_lost"] in [step - 1 - n for n in range(0, step, EVERY)], "back to a checkpoint, or to the start"


def test_a_loss_curve_that_differs_counts_as_lost(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fault_matrix, "make_data", lambda folder: 320)
    bench = Bench(tmp_path)
    monkeypatch.setattr(bench, "_reference", [(3.0, 9, 4), (2.0, 8, 5)])
    recipe = bench.recipe("run")
    run = bench.run_of(recipe)
    run.mkdir(parents=True)
    for steps, kept in (
        ([(3.0, 9, 4), (2.0, 8, 5)], True),
        ([(3.0, 9, 4), (2.0000001, 8, 5)], False),
        ([(3.0, 9, 4), (2.0, 7, 5)], False),
        ([(3.0, 9, 4), (2.0, 8, 4)], False),
        ([(3.0, 9, 4)], False),
        ([(3.0, 9, 4), (2.0, 8, 5), (1.0, 8, 5)], False),
    ):
        lines = [{"step": 1, "loss": loss, "tokens": tokens, "loss_tokens": supervised} for loss, tokens, supervised in steps]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert bench.is_kept(recipe) is kept, steps
    monkeypatch.setitem(fault_matrix.FAULTS, "kill", lambda bench: Row("kill", "not noticed", None, None, False))
    assert main(["--only", "kill"]) == 1
    assert "lost or not noticed: kill" in capsys.readouterr().out
