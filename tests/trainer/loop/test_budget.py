"""What a budget makes of the other settings is said before the first step."""

from __future__ import annotations

from typing import Any

import pytest

from chatmill.trainer.config import Recipe
from chatmill.trainer.loop.budget import remarks


@pytest.mark.parametrize(
    ("sections", "steps", "said"),
    [
        ({"train": {"steps": 1000, "epochs": 1}}, 12, ["train.epochs=1 ends the run after 12 steps, before train.steps=1,000"]),
        ({"train": {"steps": 50, "tokens": 3000}}, 12, ["train.tokens=3,000 ends the run after 12 steps"]),
        ({"train": {"epochs": 1}}, 12, []),
        ({"train": {"steps": 12, "epochs": 1}}, 12, []),
        ({"train": {"epochs": 1}, "schedule": {"warmup_steps": 48}}, 12, ["the rate reaches 25% of optimizer.lr=0.001"]),
        ({"train": {"steps": 12}, "schedule": {"warmup_steps": 12}}, 12, ["warmup_steps=12 is not over before the end"]),
        ({"train": {"steps": 12}, "schedule": {"warmup_steps": 11}}, 12, []),
    ],
)
def test_a_budget_that_cuts_steps_or_the_warm_up_says_so(sections: dict[str, Any], steps: int, said: list[str]) -> None:
    asked = Recipe.model_validate(sections | {"optimizer": {"lr": 1e-3}})
    counted = asked.model_copy(update={"train": asked.train.model_copy(update={"steps": steps})})
    found = list(remarks(asked, counted))
    assert len(found) == len(said) and all(words in line for words, line in zip(said, found, strict=True))
