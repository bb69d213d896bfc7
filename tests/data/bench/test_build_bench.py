"""The benchmark of the build measures a real one, and its raw files are what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from chatmill.data.bench import checkouts
from chatmill.data.bench.build import bench, table
from chatmill.data.bench.raw_mix import FORMATS, write_mix
from chatmill.data.importers.registry import recognise
from chatmill.data.raw.finding import find_files


def test_the_mix_is_recognised_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_mix(tmp_path / name, 0.1)
    files = find_files(str(tmp_path / "one"))
    assert len(files) == len(FORMATS)
    assert {recognise(file) for file in files} == {"openai", "sharegpt", "alpaca", "documents", "csv", "whatsapp"}
    for file in (tmp_path / "one").iterdir():
        if file.suffix != ".gz":  # gzip writes the time down
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_every_stage_is_measured(tmp_path: Path) -> None:
    results = bench(0.2, 1, 0, sys.executable, tmp_path, False, lambda stage, done, total: None)
    names = [row["stage"] for row in results["stages"]]
    assert names == ["import", "clean", "dedup", "split", "train tokenizer", "tokenize", "shard"]
    assert all(row["seconds"] > 0 for row in results["stages"] if row["stage"] in ("import", "clean", "tokenize"))
    assert results["tokens"] > 30_000 and results["peak_mib"]["parent"] >= results["peak_mib"]["baseline"] > 0
    assert "tokens/s/core" in table(results)


def test_checkouts_are_compared_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[3]
    checkouts.write_chinese(tmp_path / "zh.jsonl", 0.01)
    assert recognise(find_files(str(tmp_path / "zh.jsonl"))[0]) == "openai"
    assert checkouts.main([str(root), "--mb", "0.05", "--rounds", "1", "--no-chitchat"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["tokens/s", "import", "clean", "train", "tokenize", "shard"]
    assert all(float(row[-1]) > 0.1 for row in rows[1:])
