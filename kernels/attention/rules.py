"""Attention's options as one record: who sees whom, and how scores are shaped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = 1.4426950408889634


class Rules(NamedTuple):
    """Plain numbers, so that a torch operator takes them flat: `operator(..., *rules)`. window and softcap: 0 means none."""

    causal: bool
    window: int
    softcap: float
    scale: float

    @property
    def base2(self) -> tuple[float, float]:
        """scale * log2(e) and softcap * log2(e): the kernels' exponentials are base 2."""
        return self.scale * LOG2E, max(self.softcap, 1e-6) * LOG2E

    def key_range(self, first: int, last: int, length: int) -> tuple[int, int]:
        """Keys that queries first..last-1 of a document may see."""
        low = max(0, first - self.window + 1) if self.window else 0
        high = last if self.causal else (min(length, last - 1 + self.window) if self.window else length)
        return low, high

    def hidden(self, first: int, last: int, low: int, high: int, lengths: Tensor | None, device: torch.device) -> Tensor | None:
        """Bool (B or 1, last - first, high - low), True where a key is not seen; None where all are seen."""
        rows = torch.arange(first, last, device=device)[:, None]
        columns = torch.arange(low, high, device=device)[None]
        mask = columns > rows if self.causal else None
        if self.window and (last - 1 - low >= self.window or (not self.causal and high - 1 - first >= self.window)):
            far = (rows - columns).abs() >= self.window
            mask = far if mask is None else mask | far
        if lengths is not None and not self.causal:
            padded = columns >= lengths[:, None, None]
            return padded if mask is None else mask[None] | padded
        return None if mask is None else mask[None]

    def cap_(self, scores: Tensor) -> Tensor:
        """The soft-cap, in place."""
        return scores if not self.softcap else scores.div_(self.softcap).tanh_().mul_(self.softcap)
