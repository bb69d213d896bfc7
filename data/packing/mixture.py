"""Several data sets by weight, on a deterministic schedule; the weights may change at given steps (curriculum).

    Mixture({"chat": chat, "code": code}, {"chat": 3, "code": 1})
    Mixture({"chat": chat, "code": code}, {0: {"chat": 1}, 1000: {"chat": 1, "code": 1}})     # code from step 1000 on

Largest deficit: of n packs taken since the weights last changed, source i should have had n w_i / sum(w); the next pack comes
from the source that is furthest behind, so that none is ever more than a pack or two from its share. Packs are full but for a
fraction of a per cent: the weights are shares of tokens. Integers only: no rounding can differ between machines.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from chatmill.config import ConfigError

from .order import DialogueSource

Weights = Mapping[str, float]
SCALE = 1_000_000  # a weight's share is kept to one part in a million


class Mixture:
    """Data sets by name and their weights, from step 0 on or {first step: weights}."""

    def __init__(self, sources: Mapping[str, DialogueSource], weights: Weights | Mapping[int, Weights]) -> None:
        self.sources: dict[str, DialogueSource] = dict(sources)
        phases: dict[int, Weights] = {}
        for key, value in weights.items():
            if isinstance(value, Mapping):
                phases[int(key)] = value
            else:
                phases.setdefault(0, {})
                phases[0] = {**phases[0], str(key): value}
        self.phases: list[tuple[int, tuple[int, ...]]] = [(step, self._shares(phases[step])) for step in sorted(phases)]
        if not self.sources or not self.phases or self.phases[0][0] != 0:
            raise ConfigError(f"data.mixture: expected weights from step 0 on, got {sorted(phases)} for {list(self.sources)}.")
        if len({source.vocab_size for source in self.sources.values()}) != 1:
            sizes = {name: source.vocab_size for name, source in self.sources.items()}
            raise ConfigError(f"data.mixture: the data sets have different vocabularies: {sizes}.\nTokenise them alike.")

    def _shares(self, weights: Weights) -> tuple[int, ...]:
        unknown = sorted(set(weights) - set(self.sources))
        if unknown:
            raise ConfigError(f"data.mixture: weight for unknown data set {unknown[0]!r}; there are {', '.join(self.sources)}.")
        values = [float(weights.get(name, 0)) for name in self.sources]
        if not all(math.isfinite(value) and value >= 0 for value in values) or sum(values) <= 0:
            raise ConfigError(f"data.mixture: weights must be finite, not negative, and not all 0; got {dict(weights)}.")
        shares = tuple(round(value / sum(values) * SCALE) for value in values)
        small = [name for name, value, share in zip(self.sources, values, shares, strict=True) if value and not share]
        if small:
            raise ConfigError(f"data.mixture: the weight of {small[0]!r} is under one part in {SCALE:,}; leave it out.")
        return shares

    @staticmethod
    def of(dataset: DialogueSource | Mixture) -> Mixture:
        """A mixture as it is; one data set as the only one of a mixture."""
        return dataset if isinstance(dataset, Mixture) else Mixture({"data": dataset}, {"data": 1})

    @property
    def fingerprint(self) -> str:
        """Changes when a data set or its name does; weights are not part of it. Of one data set: that data set's own."""
        if len(self.sources) == 1:
            return next(iter(self.sources.values())).fingerprint
        text = "\n".join(f"{name}={source.fingerprint}" for name, source in self.sources.items())
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def identity(self) -> str:
        """Changes with the fingerprint, and with what is held back in a quarantine (data/shards/quarantine.py)."""
        parts = [f"{name}={getattr(source, 'identity', source.fingerprint)}" for name, source in self.sources.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The vocabulary that all data sets share."""
        return next(iter(self.sources.values())).vocab_size

    def shares(self, step: int) -> tuple[int, ...]:
        """Integer weight of every source at a step."""
        return next(shares for first, shares in reversed(self.phases) if first <= step)

    def changes_at(self, step: int) -> bool:
        """Whether new weights begin with this step."""
        return step > 0 and any(first == step for first, _ in self.phases)

    def past(self, step: int) -> list[list[Any]]:
        """[first step, {name: integer weight}] of all weights that the steps before `step` used."""
        return [
            [first, {name: share for name, share in zip(self.sources, shares, strict=True) if share}]
            for first, shares in self.phases
            if first < step
        ]


def largest_deficit(shares: Sequence[int], taken: Sequence[int], alive: Sequence[bool]) -> int | None:
    """The source furthest behind its share (the first of equals), among those alive with a share; None where there is none."""
    if len(shares) == 1:
        return 0 if alive[0] else None
    able = [i for i, share in enumerate(shares) if share and alive[i]]
    if len(able) < 2:
        return able[0] if able else None
    total, count = sum(shares[i] for i in able), sum(taken[i] for i in able) + 1
    return max(able, key=lambda i: (shares[i] * count - taken[i] * total, -i))
