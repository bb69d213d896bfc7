"""The loader benchmark: every loader reads the same tokens, and the table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatmill.data import stream_bench


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


def test_a_loader_that_loses_tokens_is_refused(tmp_path: Path) -> None:
    short = stream_bench.Loader("short", lambda: iter([3, 4]), None, 0)
    with pytest.raises(ValueError, match="short gave 7 tokens, expected 8"):
        stream_bench.measure([short], 8, 1)
