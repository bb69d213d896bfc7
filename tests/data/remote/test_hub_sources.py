"""Data sets of a hub as sources. Truth: a stand-in of the hubs' HTTP API on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hub_stand_in import HubStandIn

from chatmill.config import ConfigError
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.raw.finding import find_files
from chatmill.data.recipe import DataRecipe


def chats(first: int, count: int) -> bytes:
    turns = ([f"What is {n} and {n}?", f"It is {n * 2}, of course."] for n in range(first, first + count))
    lines = ({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A hub with datasets/acme/chats in three files and a card."""
    with HubStandIn() as stand_in:
        files = {"README.md": b"# chats", ".gitattributes": b"", "extra.jsonl": chats(0, 3)}
        files |= {"data/a.jsonl": chats(100, 20), "data/b.jsonl": chats(200, 20)}
        stand_in.repositories["datasets/acme/chats"] = files
        stand_in.use(monkeypatch, tmp_path)
        yield stand_in


@pytest.mark.parametrize("site", ["hf", "modelscope"])
def test_names(hub: HubStandIn, site: str) -> None:
    """A whole data set, a folder, a glob, one file; what is not there says which forms there are."""
    if site == "modelscope":
        pytest.importorskip("modelscope_hub", reason="needs modelscope-hub (extra: modelscope)")
    found = {
        rest: [file.path.name for file in find_files(f"{site}://datasets/acme/chats{rest}")]
        for rest in ("", "/data", "@main/data/*.jsonl", "/data/b.jsonl")
    }
    assert sorted(found[""]) == ["README.md", "a.jsonl", "b.jsonl", "extra.jsonl"]
    assert found["/data"] == found["@main/data/*.jsonl"] == ["a.jsonl", "b.jsonl"]
    assert found["/data/b.jsonl"] == ["b.jsonl"]
    for wrong in (f"{site}://datasets/acme/none", f"{site}://acme/chats", "acme/chats"):
        with pytest.raises(ConfigError, match=r"no such file.*hf://datasets/ORG/NAME or modelscope://datasets/ORG/NAME"):
            find_files(wrong)


def test_build(hub: HubStandIn, tmp_path: Path) -> None:
    """A data set from the hub has the bytes of one from the same files here."""
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(hub.repositories["datasets/acme/chats"][f"data/{name}.jsonl"])
    digests = []
    for number, path in enumerate((str(tmp_path / "data"), "hf://datasets/acme/chats/data")):
        recipe = DataRecipe.model_validate(
            {
                "name": "chats",
                "out": str(tmp_path / f"out{number}"),
                "sources": [{"format": "openai", "path": path}],
                "split": {"validation": 0.2},
                "tokenizer": {"train": {"vocab_size": 300}},
            }
        )
        build_dataset(recipe)
        manifest = json.loads((tmp_path / f"out{number}" / "manifest.json").read_text())
        digests.append(
            (manifest["splits"]["train"]["dialogues"], manifest["splits"]["train"]["tokens"], manifest["recipe_sha256"])
        )
    assert digests[0] == digests[1]
