"""What a conversation is called, by its content: renamed, longer, shortened and repeated exports keep uids and sides.

    conversation = identified(conversation)          # its uid and meta["thread"] no longer depend on files and lines
    reason, copy = resolve(uids, sizes, keep)        # samples that share a uid

The thread, which decides the side of the split, is a hash of how the conversation begins: the first turn and the first line of
the second, whoever speaks. The uid adds the time of the first turn, where there is one. Both stay when later messages come,
when earlier conversations of a chat are gone, and when the export lies in another file. Where an importer names the thread
itself (a tree of replies), it stays, and the uid is a hash of the thread and all turns.

Where two samples have one uid and a time, they are two exports of one conversation: the longest stays. Without times, they may
be two people who begin alike: both stay, and the later ones get a uid of their own.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..conversation import Conversation, make_uid
from ..preference import REJECTED
from .dedup import canonical

DOCUMENT_CHARS = 1000  # of a document that count as its beginning


def _digest(*parts: str) -> str:
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode("utf-8", "surrogatepass"))


def identified(conversation: Conversation) -> Conversation:
    """The conversation with a uid and meta["thread"] made from its content; unchanged if its importer restored a uid."""
    if conversation.uid != make_uid(conversation.source, conversation.origin):
        return conversation
    spoken = [turn for turn in conversation.turns if turn.role != "system"] or list(conversation.turns)
    rejected = canonical(str(conversation.meta.get(REJECTED, "")))
    if "thread" in conversation.meta:
        thread = str(conversation.meta["thread"])
        uid = _digest("tree", thread, *(canonical(turn.content) for turn in spoken), rejected)
    else:
        if conversation.is_document:
            begin = [canonical("".join(turn.content for turn in spoken)[:DOCUMENT_CHARS])]
        else:  # what one speaker says in a row may go on in a later export
            begin = [canonical(turn.content.strip().split("\n")[0] if i else turn.content) for i, turn in enumerate(spoken[:2])]
        thread = _digest("thread", *begin)
        uid = _digest("uid", thread, "" if began(conversation) is None else repr(began(conversation)), rejected)
    return replace(conversation, uid=uid, meta={**conversation.meta, "thread": thread})


def began(conversation: Conversation) -> float | None:
    """Time of the first turn, seconds since 1970; None where the export has none."""
    return next((turn.time for turn in conversation.turns if turn.role != "system"), None)


def size_of(sample: Conversation) -> int:
    """Characters of a sample that has a time, 0 of one without."""
    return 0 if began(sample) is None else 1 + sum(len(turn.content) for turn in sample.turns)


def resolve(
    uids: NDArray[np.bytes_], sizes: NDArray[np.int64], keep: NDArray[np.bool_], known: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(stays (N,), copy (N,)): of kept samples that share a uid, the longest where they have times, else all of them.

    copy: 0 for the one that has the uid, 1, 2 … for those that get one of their own (conversation.part_uid(uid, -copy)).
    known: copy of the first samples, which is decided already. A longer one takes over the uid of the one that it replaces.
    """
    stays, copy = keep.copy(), np.zeros(len(keep), dtype=np.int64)
    decided = 0 if known is None else len(known)
    copy[:decided] = known if known is not None else 0
    kept = np.flatnonzero(keep)
    _, inverse, counts = np.unique(uids[kept], return_inverse=True, return_counts=True)
    same: dict[int, list[int]] = {}
    for i in np.flatnonzero(counts[inverse] > 1).tolist():
        same.setdefault(int(inverse[i]), []).append(int(kept[i]))
    for members in same.values():
        timed = [i for i in members if sizes[i] > 0]
        longest = max(timed, key=lambda i: (sizes[i], -i), default=-1)
        if timed:
            stays[timed] = False
            stays[longest] = True
        used = {int(copy[i]) for i in members if i < decided and stays[i]}
        new = [i for i in members if i >= decided and stays[i]]
        if longest in new and (replaced := [int(copy[i]) for i in timed if i < decided]):
            copy[longest] = min(replaced)
            used.add(min(replaced))
            new.remove(longest)
        free = (number for number in count() if number not in used)
        for i in new:
            copy[i] = next(free)
    return stays, copy
