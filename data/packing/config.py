"""Recipe fields that say which dialogues a run learns from, and when.

    data:
      path: corpora/chitchat                      # one data set; or, instead:
      mix: [{path: corpora/chat, weight: 3}, {path: corpora/code, weight: 1}]
      curriculum: [{step: 1000, weights: {chat: 1, code: 1}}]
      exclude: [{step: 500, uids: [some-uid]}, {step: 800, file: bad-uids.txt}]

`step` counts the steps done before a change holds: 0 is from the beginning, 1000 is what the checkpoint of step 1000 can
first be continued with. Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import Field, model_validator

from chatmill.config import Section


class MixItem(Section):
    """A data set of a mix. weight: its share of the tokens against the others'. name: how weights and metrics call it
    (None: the folder's name).
    """

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, ge=0)
    name: str | None = Field(default=None, min_length=1)

    @property
    def called(self) -> str:
        """The name, given or taken from the folder."""
        return self.name or PurePath(self.path).name


class CurriculumStage(Section):
    """Weights by name that hold once `step` steps are done; data sets that are not named get none."""

    step: int = Field(gt=0)
    weights: dict[str, float]


class Exclusion(Section):
    """Dialogues that are not used once `step` steps are done: by id here, or one id per line of a file."""

    step: int = Field(default=0, ge=0)
    uids: tuple[str, ...] = ()
    file: str | None = None

    @model_validator(mode="after")
    def _check_given(self) -> Exclusion:
        if not self.uids and self.file is None:
            raise ValueError("an exclusion needs uids or a file")
        return self


class SourcesSection(Section):
    """path: a data-set folder made by `chatmill data build`. mix: several, by weight; it takes the place of path.

    curriculum: other weights from given steps on. exclude: dialogues that are left out from given steps on.
    damaged_blocks: largest share of a split's blocks that may be in the quarantine of its data set (data/shards/quarantine.py).
    """

    path: str = "corpora/chitchat"
    mix: tuple[MixItem, ...] = ()
    curriculum: tuple[CurriculumStage, ...] = ()
    exclude: tuple[Exclusion, ...] = ()
    damaged_blocks: float = Field(default=0.0, ge=0, lt=1)

    @property
    def paths(self) -> dict[str, str]:
        """Data-set folders by name."""
        return {item.called: item.path for item in self.mix} or {"data": self.path}

    @property
    def weights(self) -> dict[int, dict[str, float]]:
        """{steps done before: weights by name}."""
        first = {item.called: item.weight for item in self.mix} or {"data": 1.0}
        return {0: first} | {stage.step: dict(stage.weights) for stage in self.curriculum}

    @model_validator(mode="before")
    @classmethod
    def _mix_takes_the_place_of_path(cls, values: Any) -> Any:
        """Whatever asks for one folder (tokenizer, inputs to check, report) gets the first of the mix."""
        mix = values.get("mix") if isinstance(values, Mapping) else None
        if mix and isinstance(mix[0], Mapping) and "path" in mix[0]:
            return {**values, "path": mix[0]["path"]}
        return values

    @model_validator(mode="after")
    def _check_names(self) -> SourcesSection:
        counts = Counter(item.called for item in self.mix)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"mix: two data sets are called {twice[0]!r}; give one of them another name: {{path, name}}")
        if self.curriculum and not self.mix:
            raise ValueError("curriculum: weights can change among the data sets of a mix only; list them in mix")
        steps = [stage.step for stage in self.curriculum]
        if steps != sorted(set(steps)):
            raise ValueError(f"curriculum: steps must rise, got {steps}")
        for at, weights in self.weights.items():
            unknown = sorted(set(weights) - set(self.paths))
            if unknown:
                raise ValueError(f"curriculum: step {at}: no data set {unknown[0]!r} in mix, which has {', '.join(counts)}")
            if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
                raise ValueError(f"step {at}: weights must not be negative and not all 0, got {weights}")
        return self
