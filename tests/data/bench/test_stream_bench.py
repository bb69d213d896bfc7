"""The loader benchmark: every loader reads the same tokens, and the table says what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from chatmill.config import ConfigError
from chatmill.data.bench import stream as stream_bench
from chatmill.data.bench.other_loaders import Loader, webdataset_loader
from chatmill.data.shards.memory import MemoryDataset


def test_a_small_run_measures_every_loader_that_is_importable() -> None:
    results = stream_bench.bench(dialogues=300, mean=60, rounds=1, lengths=(256, 1024), scale=5000)
    json.dumps(results)
    loaders = {result["loader"]: result for result in results["loaders"]}
    assert {"chatmill 256", "chatmill 1024", "webdataset"} <= set(loaders)
    assert all(result["mtokens_per_s"] > 0 for result in loaders.values())
    assert 0.9 < loaders["chatmill 256"]["fill"] <= 1 and loaders["webdataset"]["fill"] is None
    assert set(results["resume_at_scale"]["ms"]) == {"start", "middle", "end"}
    text = stream_bench.table(results)
    assert "webdataset" in text and "resume in 5,000 dialogues" in text
    for name in results["not_importable"]:
        assert name in text


def test_what_is_not_importable_here_takes_its_turns_in_another_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # in this process only
    results = stream_bench.bench(
        dialogues=100,
        mean=60,
        rounds=2,
        lengths=(1024,),
        scale=5000,
        against=["webdataset"],
        python=sys.executable,
        memory_dialogues=400,
    )
    found = {result["loader"]: result for result in results["loaders"]}
    assert "webdataset" in found and found["webdataset"]["resume_ms"] > 0
    assert all(isinstance(result["memory_mib"], float) for result in found.values())
    assert "webdataset" not in results["not_importable"]


def test_the_other_loaders_resume_in_the_middle(tmp_path: Path) -> None:
    made = MemoryDataset.random(31, mean=20)
    loader = webdataset_loader(tmp_path / "wds", list(zip(made.ids, made.masks, strict=True)))
    whole = list(loader.open())
    assert whole == made.lengths.tolist()
    assert loader.resume is not None and list(loader.resume(15)) == whole[15:]


def test_a_loader_that_loses_tokens_is_refused(tmp_path: Path) -> None:
    short = stream_bench.here(Loader("short", lambda: iter([3, 4]), None, 0))
    with pytest.raises(ValueError, match="short gave 7 tokens, expected 8"):
        stream_bench.measure([short], 8, 1)


def test_an_unknown_loader_and_an_interpreter_that_is_none_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no loader 'energon'"):
        stream_bench.bench(dialogues=10, against=["energon"])
    with pytest.raises(ConfigError, match="cannot be started"):
        stream_bench.bench(dialogues=10, lengths=(64,), against=["streaming"], python=str(tmp_path / "none"))
