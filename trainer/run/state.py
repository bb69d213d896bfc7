"""What a run carries from step to step besides weights, optimizer and random generators: state.json of a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """step: optimizer steps done. tokens, loss_tokens: used so far, over all ranks.

    losses, skipped_in_row: what the guard compares with (guard.py). best_value, best_step: the best validation so far;
    stale_validations: number of validations after it. lineage: origins of these weights, oldest first.
    """

    step: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    skipped_in_row: int = 0
    best_value: float | None = None
    best_step: int = -1
    stale_validations: int = 0
    lineage: list[dict[str, Any]] = field(default_factory=list)

    def validated(self, figures: dict[str, float], metric: str) -> bool:
        """Record a validation; True when it is the best so far (lowest loss, or highest accuracy).

        One whose loss is NaN or infinite is never the best, whatever its accuracy.
        """
        value = figures[metric]
        better = math.isfinite(figures["loss"]) and math.isfinite(value)
        if better and self.best_value is not None:
            better = value < self.best_value if metric == "loss" else value > self.best_value
        if better:
            self.best_value, self.best_step, self.stale_validations = value, self.step, 0
        else:
            self.stale_validations += 1
        return better

    def as_json(self, stream: dict[str, Any]) -> bytes:
        """state.json: this and the stream's position."""
        return (json.dumps({**asdict(self), "stream": stream}, indent=1) + "\n").encode()

    @staticmethod
    def from_json(text: str) -> tuple[TrainState, dict[str, Any]]:
        """(state, stream position) of a state.json of this or an older version."""
        values = json.loads(text)
        known = {f.name for f in fields(TrainState)}
        state = TrainState(**{name: value for name, value in values.items() if name in known})
        if state.best_value is not None and not math.isfinite(state.best_value):  # version 0.1 could not get rid of one
            state.best_value, state.best_step = None, -1
        return state, values["stream"]
