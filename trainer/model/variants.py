"""Which of a model's variants computes each token: several adapters on one base in memory.

    with using(2): model.cached_logits(tokens, cache)                         # all tokens by variant 2
    with using_rows([0, 2, 1], device): model.hidden_states(tokens, ...)      # three tokens, each by its own

Variant 0 is the model itself, and what computes where nothing was chosen. Only layers that have variants ask
(`chatmill.trainer.adapters.shared`). The choice belongs to the thread that made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

_CHOSEN: ContextVar[int | Tensor] = ContextVar("variant", default=0)


def chosen() -> int | Tensor:
    """The variant of all tokens, or Int64["T"] with that of each."""
    return _CHOSEN.get()


@contextlib.contextmanager
def using(variant: int | Tensor) -> Iterator[None]:
    """Within this context the variant computes all tokens, or each token is computed by its own."""
    before = _CHOSEN.set(variant)
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def using_rows(variants: Sequence[int], device: torch.device) -> contextlib.AbstractContextManager[None]:
    """`using` with one variant per token; one number where they are all the same."""
    return using(variants[0] if len(set(variants)) == 1 else torch.tensor(list(variants), device=device))
