"""Preference pairs: one context, the reply that people liked better, and one they liked less.

    {"prompt": …, "chosen": …, "rejected": …}  ->  Conversation(…, chosen) with meta["rejected"]  ->  one sample of two halves

A pair is stored as one dialogue of the ordinary token shards: ids of context + chosen, then ids of context + rejected; the loss
mask marks the two replies alone. Both halves begin with the same context, so the place where the second begins follows from
the mask: (start of the second supervised run) - (start of the first). The stream makes two segments of it, in one pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

from .conversation import Conversation, Turn
from .ledger import Ledger

if TYPE_CHECKING:
    from .cleaning.clean import Cleaner

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


def clean(cleaner: Cleaner, conversation: Conversation, ledger: Ledger) -> Conversation | None:
    """Clean both dialogues of a pair; what drops one of them drops the pair. Other conversations as cleaner.apply."""
    if REJECTED not in conversation.meta:
        return cleaner.apply(conversation, ledger)
    aside = Ledger("conversations")
    worse = cleaner.apply(with_rejected(conversation), aside)
    if worse is None or worse.turns[-1].role != "assistant":
        reason = next(iter(aside.dropped), "turn dropped")
        ledger.drop(f"rejected reply: {reason}", f"{conversation.origin}: {conversation.meta[REJECTED]}")
        return None
    better = cleaner.apply(conversation, ledger)
    return better and replace(better, meta={**better.meta, REJECTED: worse.turns[-1].content})


def samples(conversation: Conversation, thread: str, ledger: Ledger) -> Iterator[Conversation]:
    """The pair as a training sample, its loss on the two last replies alone; none where there is nothing to prefer."""
    turns, rejected = conversation.turns, conversation.meta.get(REJECTED)
    reason = None
    if rejected is None:
        reason = "no rejected reply"
    elif len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role not in ("user", "tool"):
        reason = "pair does not end with a user turn and a reply"
    elif turns[-1].content.strip() == rejected.strip():
        reason = "chosen and rejected are the same"
    if reason is not None:
        ledger.drop(reason, f"{conversation.origin}: {' / '.join(turn.content for turn in turns[-2:])}")
        return
    context = tuple(replace(turn, loss=False) if turn.role == "assistant" else turn for turn in turns[:-1])
    ledger.keep()
    yield replace(conversation, turns=(*context, replace(turns[-1], loss=True)), meta={**conversation.meta, "thread": thread})


def joint(loss_mask: NDArray[np.bool_]) -> int:
    """Index of the first token of the second half, of a pair's loss mask Bool["L"]. Raises ConfigError for any other mask."""
    edges = np.flatnonzero(np.diff(loss_mask, prepend=False, append=False))
    if len(edges) != 4:
        raise ConfigError(
            f"preference pair: expected two supervised replies in a pair, found {len(edges) // 2}.\n"
            "The data set was not built with pair.mode=preference, or is damaged: run `chatmill data verify`."
        )
    return int(edges[2] - edges[0])


def reply(text: str) -> Turn:
    """An assistant turn."""
    return Turn("assistant", text)
