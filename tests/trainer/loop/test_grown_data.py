"""A run whose data set grows while it waits goes on as if nothing had happened, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from chatmill.data.pipeline.collect import collect
from chatmill.data.recipe import DataRecipe
from chatmill.run_files import read_jsonl
from chatmill.trainer.config import load_recipe
from chatmill.trainer.loop.loop import train

from ..conftest import cut_back, make_chats


def test_a_continued_run_takes_the_same_steps_on_a_set_that_has_grown(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: object
) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()

    def export(name: str, seed: int) -> None:
        (raw / name).write_text("".join(json.dumps(chat) + "\n" for chat in make_chats(90, seed)), encoding="utf-8")
        sources = [{"format": "openai", "path": str(raw)}]
        split, tokenizer = {"validation": 0.2}, {"train": {"vocab_size": 384}}
        collect(
            DataRecipe.model_validate(
                {"name": "grows", "out": str(data), "sources": sources, "split": split, "tokenizer": tokenizer, "workers": 1}
            )
        )

    export("a.jsonl", 0)
    recipe = load_recipe(
        str(write_recipe("run", data={"path": str(data)}, checkpoint={"every_steps": 2}, train={"steps": 4})), []
    )
    train(recipe)
    metrics = recipe.run_dir / "metrics.jsonl"

    def figures() -> list[tuple[int, float, float | None]]:
        return [(line["step"], line.get("loss", 0.0), line.get("eval", {}).get("loss")) for line in read_jsonl(metrics)]

    before = figures()
    assert len({step for step, _, _ in before}) == 4
    cut_back(recipe.run_dir, 2)
    export("b.jsonl", 1)
    train(recipe)
    assert figures() == before
    events = [line for line in read_jsonl(recipe.run_dir / "events.jsonl") if line.get("event") == "data_grown"]
    assert len(events) == 1 and "goes on with the" in events[0]["reason"]
    fresh = load_recipe(str(write_recipe("fresh", data={"path": str(data)}, train={"steps": 1})), [])
    train(fresh)
    marks = [json.loads((r.run_dir / "environment.json").read_text())["data"]["train"]["data"] for r in (recipe, fresh)]
    assert marks[0] != marks[1]
