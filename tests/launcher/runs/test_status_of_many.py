"""`chatmill status` says what it can of every run: one damaged folder hides no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatmill.launcher.__main__ import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "d"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("train: {steps: 5}\n")
        (tmp_path / "runs" / name / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    (tmp_path / "runs" / "b" / "metrics.jsonl").write_text('{"step": null, "loss": 1.5}\n')
    (tmp_path / "runs" / "c" / "launches" / "1").mkdir(parents=True)
    (tmp_path / "runs" / "c" / "launches" / "1" / "job.json").write_text("{")
    return tmp_path / "runs"


def test_damaged_runs_are_named_beside_the_others(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 2
    told = capsys.readouterr()
    for name in ("a", "d"):
        assert f"{runs / name}\n" in told.out and "step        3 of 5" in told.out
    assert len(told.err.splitlines()) == 2
    assert (
        f"error: {runs / 'b'}: its records are damaged" in told.err
        and f"{runs / 'c' / 'launches' / '1' / 'job.json'}" in told.err
    )
    assert main(["status", "--json"]) == 2
    assert [Path(json.loads(line)["run"]).name for line in capsys.readouterr().out.splitlines()] == ["a", "d"]
    assert main(["status", "b", "a"]) == 2 and "3 of 5" in capsys.readouterr().out
    assert main(["status", "a"]) == 0
