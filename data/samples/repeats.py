"""How much of a validation split is trained on, word for word: a loss on such texts measures memory.

    found = repeats(train, validation)      {"replies": 38, "repeated": 36, "loss_tokens": 533, "repeated_tokens": 501}
    in_words(found)                         "repeats training texts: 36 of 38 replies …", or None where that is rare

A split keeps dialogues apart, not what is said in them: dialogues drawn from few texts, canned answers of a support desk and
greetings stand on both sides. A reply is a run of tokens with loss; 8 bytes are kept of each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..shards.dataset import TokenDataset

MUCH = 0.5  # of the tokens with loss


def repeats(train: TokenDataset, validation: TokenDataset) -> dict[str, int]:
    """Replies of the validation split and those that the training split holds, token for token; with their tokens."""
    known = np.array(array("Q", (hashed for hashed, _ in _replies(train))), dtype=np.uint64)
    asked = list(_replies(validation))
    hashes = np.array([hashed for hashed, _ in asked], dtype=np.uint64)
    lengths = np.array([length for _, length in asked], dtype=np.int64)
    again = np.isin(hashes, known)
    return {
        "replies": len(asked),
        "repeated": int(again.sum()),
        "loss_tokens": int(lengths.sum()),
        "repeated_tokens": int(lengths[again].sum()),
    }


def in_words(found: Mapping[str, Any] | None) -> str | None:
    """What to say where more than half of the tokens with loss stand in such replies; None elsewhere, and of older sets."""
    if not found or found["repeated_tokens"] <= MUCH * found["loss_tokens"]:
        return None
    share = found["repeated_tokens"] / found["loss_tokens"]
    return (
        f"repeats training texts: {found['repeated']:,} of {found['replies']:,} replies ({share:.0%} of the tokens with loss) "
        "are trained on word for word, so its loss shows what the model remembers, not how it does on new texts"
    )


def _replies(dataset: TokenDataset) -> Iterator[tuple[int, int]]:
    """(hash, tokens) of every reply."""
    for b in range(dataset.n_blocks):
        block = dataset.read_block(b)
        ids = np.ascontiguousarray(block.ids, dtype=np.uint32)
        for first, last in _runs(block.loss_mask, block.offsets):
            yield xxhash.xxh3_64_intdigest(ids[first:last].tobytes()), last - first


def _runs(mask: NDArray[np.bool_], offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Where runs of tokens with loss begin and end; none crosses into the next dialogue."""
    edges = np.zeros(len(mask) + 1, dtype=np.bool_)
    edges[1:-1] = mask[1:] != mask[:-1]
    edges[offsets] = True
    bounds = np.flatnonzero(edges)
    starts = bounds[:-1]
    chosen = mask[starts]
    yield from zip(starts[chosen].tolist(), bounds[1:][chosen].tolist(), strict=True)
