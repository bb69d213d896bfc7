"""The fault matrix itself: one row for real, and that a loss would be seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatmill.launcher.__main__ import main as chatmill
from chatmill.launcher.doctor import faults as fault_matrix
from chatmill.launcher.doctor.faults import Bench, FaultResult, FaultyRun, main


@pytest.mark.slow
def test_kill_minus_nine_of_a_rank_loses_nothing(tmp_path: Path, capsys) -> None:
    assert main(["--only", "kill", "--seed", "3", "--out", str(tmp_path / "table.json")]) == 0
    out = capsys.readouterr().out
    assert "seed 3" in out and "1 faults; nothing was lost in any" in out
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["kept"]
    assert row["steps_lost"] in (2, 6), "the checkpoint of step 4, or where it was still being written none"
    assert "local rank 1" in row["detected"]


def test_a_loss_curve_that_differs_counts_as_lost(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fault_matrix, "make_data", lambda folder: 320)
    bench = Bench(tmp_path)
    monkeypatch.setattr(bench, "_reference", [(3.0, 9, 4), (2.0, 8, 5)])
    run = FaultyRun(bench, "run")
    run.folder.mkdir(parents=True)
    for steps, kept in (
        ([(3.0, 9, 4), (2.0, 8, 5)], True),
        ([(3.0, 9, 4), (2.0000001, 8, 5)], False),
        ([(3.0, 9, 4), (2.0, 7, 5)], False),
        ([(3.0, 9, 4), (2.0, 8, 4)], False),
        ([(3.0, 9, 4)], False),
        ([(3.0, 9, 4), (2.0, 8, 5), (1.0, 8, 5)], False),
    ):
        lines = [{"step": 1, "loss": loss, "tokens": tokens, "loss_tokens": supervised} for loss, tokens, supervised in steps]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert run.is_kept() is kept, steps
    monkeypatch.setitem(fault_matrix.FAULTS, "kill", lambda bench: FaultResult("kill", "not noticed", None, None, False))
    assert main(["--only", "kill"]) == 1
    assert "lost or not noticed: kill" in capsys.readouterr().out


def test_the_doctor_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(fault_matrix, "main", lambda words: seen.append(words) or 0)
    assert chatmill(["doctor", "--faults", "--only", "kill", "--seed", "0", "--out", "table.json"]) == 0
    assert chatmill(["doctor", "--faults"]) == 0
    assert seen == [["--only", "kill", "--seed", "0", "--out", "table.json"], []]
