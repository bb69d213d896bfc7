"""How many rows a checkpoint's tables need for the tokenizer of a data set. Needs no torch: `chatmill launch` asks, too."""

from __future__ import annotations

from pathlib import Path

from chatmill.config import ConfigError

from ...data.tokenizer.new_tokens import tokens_beyond
from ...data.tokenizer.tokenizer import ChatTokenizer


def new_tokens(checkpoint: Path, tokenizer: ChatTokenizer, where: str) -> dict[str, int]:
    """The special tokens, with ids, that a tokenizer has beyond the checkpoint's; none where the checkpoint has no tokenizer.

    Raises ConfigError where the two differ in anything else. where: what was tokenised with it.
    """
    if not (checkpoint / "tokenizer.json").is_file():
        return {}
    new = tokens_beyond(ChatTokenizer.load(checkpoint, use_template=False), tokenizer)
    if new is None:
        raise ConfigError(
            f"{where} was tokenised with another tokenizer than that of {checkpoint}.\n"
            "Build the data set with the checkpoint's tokenizer: set tokenizer.path in the data recipe.\n"
            "The template may be another one, and special tokens may be added (tokenizer.add_special_tokens)."
        )
    return new


def rows_needed(checkpoint: Path, held: int, tokenizer: ChatTokenizer, where: str) -> int:
    """Rows that tables of `held` rows need for the tokenizer: as many, or more for new special tokens. Raises ConfigError.

    Rows of padding are used first; the number keeps the multiple that it had (up to 64).
    """
    needed = 1 + max(new_tokens(checkpoint, tokenizer, where).values(), default=-1)
    if needed <= held:
        return held
    multiple = min(64, held & -held)
    return -(-needed // multiple) * multiple
