"""Preference pairs: one context, the reply that people liked better, and one they liked less.

    {"prompt": …, "chosen": …, "rejected": …}  ->  Conversation(…, chosen) with meta["rejected"]  ->  one sample of two halves

A pair is stored as one dialogue of the ordinary token shards: ids of context + chosen, then ids of context + rejected; the loss
mask marks the two replies alone. Both halves begin with the same context, so the place where the second begins follows from
the mask: (start of the second supervised run) - (start of the first). The stream makes two segments of it, in one pack.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

from .conversation import Conversation

REJECTED = "rejected"


def with_rejected(conversation: Conversation) -> Conversation:
    """The dialogue that ends with the rejected reply instead, an ordinary one."""
    last = replace(conversation.turns[-1], content=conversation.meta[REJECTED])
    return replace(without_rejected(conversation), turns=(*conversation.turns[:-1], last))


def without_rejected(conversation: Conversation) -> Conversation:
    """The dialogue with the chosen reply, an ordinary one."""
    if REJECTED not in conversation.meta:
        return conversation
    return replace(conversation, meta={key: value for key, value in conversation.meta.items() if key != REJECTED})


def joint(loss_mask: NDArray[np.bool_]) -> int:
    """Index of the first token of the second half, of a pair's loss mask Bool["L"]. Raises ConfigError for any other mask."""
    edges = np.flatnonzero(np.diff(loss_mask, prepend=False, append=False))
    if len(edges) != 4:
        raise ConfigError(
            f"preference pair: expected two supervised replies in a pair, found {len(edges) // 2}.\n"
            "The data set was not built with pair.mode=preference, or is damaged: run `chatmill data verify`."
        )
    return int(edges[2] - edges[0])
