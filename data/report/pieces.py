"""Tokens of a dialogue as pieces of text with their mask, for people to look at.

    for piece in token_pieces(tokenizer, ids, mask): print(piece.text, piece.has_loss)

A character that spans several tokens is one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from ..shards.dataset import TokenDataset
from ..tokenizer.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """Text of one token, or of the few that make one character."""

    text: str
    has_loss: bool


def token_pieces(tokenizer: ChatTokenizer, ids: Sequence[int], mask: Sequence[bool]) -> Iterator[TokenPiece]:
    """Pieces in order."""
    said = b""
    for i, token in enumerate(ids):
        said += tokenizer.decoding.token_bytes(int(token))
        if i + 1 == len(ids) or mask[i + 1] != mask[i] or not _is_unfinished(said):
            yield TokenPiece(said.decode("utf-8", "replace"), bool(mask[i]))
            said = b""


def _is_unfinished(said: bytes) -> bool:
    """Could more bytes complete its last character?"""
    try:
        said.decode()
    except UnicodeDecodeError as error:
        return error.end == len(said) and error.reason == "unexpected end of data"
    return False


def dialogue_tokens(dataset: TokenDataset, number: int) -> tuple[NDArray[np.generic], NDArray[np.bool_], tuple[str, str]]:
    """(ids, loss mask, (source, origin)) of dialogue `number` in population order."""
    b = int(np.searchsorted(dataset.block_starts, number, side="right")) - 1
    block = dataset.read_block(b)
    j = number - int(dataset.block_starts[b])
    span = slice(int(block.offsets[j]), int(block.offsets[j + 1]))
    return block.ids[span], block.loss_mask[span], block.sources[j]


def token_strip(pieces: Sequence[TokenPiece]) -> str:
    """Tokens side by side, told apart by shade; <b> where they carry loss, <i> where not. Line feeds show as ↵."""
    marks = {True: "b", False: "i"}
    return "".join(
        f"<{marks[piece.has_loss]}>{escape(piece.text).replace(chr(10), '↵' + chr(10))}</{marks[piece.has_loss]}>"
        for piece in pieces
    )
