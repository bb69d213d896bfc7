"""A training and an evaluation say where their validation repeats training texts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chatmill.trainer.config import ModelConfig, Recipe
from chatmill.trainer.evaluation.evaluate import repeats_of
from chatmill.trainer.loop.validation import Validation
from chatmill.trainer.run.state import TrainState

COUNTS = {"replies": 10, "repeated": 9, "loss_tokens": 100, "repeated_tokens": 90}


@pytest.mark.parametrize("manifest", [{"repeats": COUNTS}, {}])
def test_a_validation_says_so_once_and_marks_every_line(manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"loss": 1.0, "perplexity": 2.7, "accuracy": 0.5, "loss_tokens": 100}
    monkeypatch.setattr(Validation, "_measure", lambda self, step: {"bot": figures})
    said: list[str] = []
    lines: list[dict[str, Any]] = []
    context: Any = SimpleNamespace(
        recipe=Recipe(), config=ModelConfig(), world=SimpleNamespace(is_main=True, device=torch.device("cpu")),
        display=SimpleNamespace(say=said.append), folder=SimpleNamespace(metric=lambda **line: lines.append(line)),
        splits={"bot": SimpleNamespace(manifest=manifest, path=Path("corpora/bot"))}, tokenizer=None,
    )  # fmt: skip
    engine: Any = SimpleNamespace(decoder=SimpleNamespace(eval=lambda: None), world=context.world, gathers=False)
    validation = Validation(context, engine)
    for step in (0, 5):
        validation.run(TrainState(step=step))
    repeated = bool(manifest)
    assert [("(repeats training texts)" in line) for line in said if "validation at step" in line] == [repeated] * 2
    assert (
        sum("note: the validation split of corpora/bot repeats training texts: 9 of 10 replies" in line for line in said)
        == repeated
    )
    assert [line.get("repeats_training") for line in lines] == [["corpora/bot"] if repeated else None] * 2


def test_an_evaluation_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    for name, more in (("bot", {"repeats": COUNTS}), ("chats", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"format": 1, "splits": {}} | more))
    assert repeats_of([str(tmp_path / "chats")], said.append) == {} and said == []
    bot = str(tmp_path / "bot")
    assert repeats_of([bot], said.append) == {"repeats": {bot: COUNTS}}
    assert "bot: the validation split repeats training texts" in said[0]
