"""Whether a run is finished, told from its files alone: `chatmill train` says so before it imports torch.

    finished_note(recipe)       "runs/demo is finished: 40 of 40 steps.", or None where the training has to look itself

Anything unusual (a missing file, other budgets, a checkpoint of another step) is left to the training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatmill.config import read_yaml
from chatmill.run_files import MANIFEST, list_checkpoints, read_jsonl, step_of

from ..config import Recipe
from .folder import RunFolder

ENDS = ("start", "resume", "finished")


def finished_note(recipe: Recipe) -> str | None:
    """What to say about a finished run; None where it is not known to be. Raises ConfigError for another recipe."""
    run = recipe.run_dir
    checkpoints, config = list_checkpoints(run), run / "config.yaml"
    events = [event for event in read_jsonl(run / "events.jsonl") if event.get("event") in ENDS]
    if not (checkpoints and config.is_file() and events) or events[-1]["event"] != "finished":
        return None
    old = read_yaml(config)
    before, train = old.get("train") or {}, recipe.train
    if (before.get("epochs"), before.get("tokens")) != (train.epochs, train.tokens):
        return None
    budget = train.epochs is not None or train.tokens is not None
    steps = int(before.get("steps", 0)) if budget else train.steps
    step = step_of(checkpoints[-1])
    patience = recipe.evaluation.patience
    early = bool(events[-1].get("early_stop")) and patience is not None
    early = early and patience == (old.get("evaluation") or {}).get("patience")
    if step != events[-1].get("step") or not (step >= steps > 0 or early) or not _is_complete(checkpoints[-1]):
        return None
    RunFolder(run).check_same(recipe.model_copy(update={"train": train.model_copy(update={"steps": steps})}))
    return in_words(run, step, steps)


def in_words(run: Path, step: int, steps: int) -> str:
    """That a run is finished, and how to go on."""
    on = f"To go on from its weights: run.name=NEW model.checkpoint={run}"
    how = "It stopped early; raise evaluation.patience to go on." if step < steps else on
    return f"{run} is finished: {step} of {steps} steps. {how}"


def _is_complete(checkpoint: Path) -> bool:
    """Whether all files are there, of their sizes; their bytes are not read."""
    try:
        files: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
