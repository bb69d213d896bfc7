"""Prompts: a conversation that fits into the context, and ids that the model can take.

ids, dropped = fit_messages(tokenizer, messages, context=2048, reserve=256)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatmill.config import ConfigError

from ...data.tokenizer.tokenizer import ChatTokenizer
from .grammar import Grammar
from .sampling import Sampling


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue, and how. stops: strings that end the reply and are not part of it.

    grammar: what the reply must follow; several prompts may have the same one.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None = None
    stops: Sequence[str] = ()
    grammar: Grammar | None = None


def check_prompt(prompt_ids: Sequence[int], context: int, vocab_size: int) -> None:
    """Raise ConfigError for a prompt that the model cannot take."""
    if not prompt_ids:
        raise ConfigError("the prompt is empty: expected at least one token.")
    if len(prompt_ids) >= context:
        raise ConfigError(
            f"the prompt has {len(prompt_ids)} tokens; the model's context is {context}, the reply included.\n"
            "Shorten the conversation."
        )
    wrong = [i for i in prompt_ids if not 0 <= i < vocab_size]
    if wrong:
        raise ConfigError(
            f"the prompt holds token id {wrong[0]}; the model knows 0..{vocab_size - 1}. Is this the model's own tokenizer?"
        )


def fit_messages(
    tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]], context: int, reserve: int
) -> tuple[list[int], int]:
    """Prompt ids of the newest part of a conversation that leaves `reserve` tokens for the reply.

    The oldest turns are dropped first, a question together with its answer; a leading system message and the last turn stay.
    Returns (ids, number of dropped turns). Raises ConfigError if the last turn alone does not fit.
    """
    turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    rest = turns[len(system) :]
    budget = context - min(reserve, context // 2)
    dropped = 0
    while True:
        ids = tokenizer.prompt_ids(system + rest)
        if len(ids) <= budget:
            return ids, dropped
        cut = next((i for i in range(1, len(rest)) if rest[i]["role"] == "user"), None)
        if cut is None:
            break
        rest, dropped = rest[cut:], dropped + cut
    if len(ids) < context:
        return ids, dropped
    raise ConfigError(
        f"the last message makes a prompt of {len(ids)} tokens; the model's context is {context}, the reply included.\n"
        "Shorten the message."
    )
