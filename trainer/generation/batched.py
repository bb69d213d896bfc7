"""One decoding step for many replies at once: each may have another length.

    steps = next_steps(model, [generation_a, generation_b, ...])      # one TokenStep or None (over) per generation

Decoding is bound by reading the weights, and these are read once for all replies: 8 cost little more than one.
Attention runs per reply over its own cache, the layers by each reply's own variant of the model; prompts are read one reply
at a time. Results equal those of separate replies up to the rounding of a wider matrix product.

Shapes: B replies, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.language_model import LanguageModel
from ..model.variants import using_rows
from .generation import Generation, TokenStep


def next_steps(model: LanguageModel, generations: Sequence[Generation]) -> list[TokenStep | None]:
    """Advance every generation by one token; None for those that are over."""
    rows = joint_logits(model, generations)
    return [g.accept(rows[i]) if i in rows else next(g, None) for i, g in enumerate(generations)]


@torch.no_grad()
def joint_logits(model: LanguageModel, generations: Sequence[Generation]) -> dict[int, Tensor]:
    """Logits Float["V"] by index, for the generations with exactly one token to read; empty when there are fewer than two.

    Their caches then hold that token; an exception leaves all caches as they were.
    """
    ready = [i for i, g in enumerate(generations) if not g.is_over and g.pending.numel() == 1]
    if len(ready) < 2:
        return {}
    tokens = torch.cat([generations[i].pending for i in ready])  # (B,)
    with using_rows([generations[i].variant for i in ready], tokens.device):
        logits = model.joint_logits(tokens, [generations[i].cache for i in ready])
    return dict(zip(ready, logits, strict=True))
