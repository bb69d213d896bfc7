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

    grammar: what the reply must follow; several prompts may have the same one. keep_special: special tokens stay in the text.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None = None
    stops: Sequence[str] = ()
    grammar: Grammar | None = None
    keep_special: bool = False


def bad_text(value: Any, where: str = "") -> str | None:
    """The place of the first string in parsed JSON that UTF-8 cannot say: it holds half of a character (a lone surrogate).

    None where there is none. A lone surrogate is what is left of an emoji that was cut in half, or of bytes that were no UTF-8.
    """
    if isinstance(value, str):
        return None if says_utf8(value) else where or "the text"
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not says_utf8(name):
                return f"a name in {where}" if where else "a name"
            if found := bad_text(item, f"{where}.{name}" if where else name):
                return found
    if isinstance(value, list) and not {str, dict, list}.isdisjoint(map(type, value)):
        for i, item in enumerate(value):
            if found := bad_text(item, f"{where}.{i}" if where else str(i)):
                return found
    return None


def says_utf8(text: str) -> bool:
    """Whether the text can be written in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_text(text: str, what: str) -> None:
    """Raise ConfigError for a text that is not valid Unicode."""
    if not says_utf8(text):
        raise ConfigError(
            f"{what}: not valid Unicode: it holds half of a character (a lone surrogate), or bytes that are not UTF-8.\n"
            "Is the text in another encoding, or was it cut inside an emoji?"
        )


def most_bytes(tokenizer: ChatTokenizer, context: int) -> int:
    """The longest text, in bytes of UTF-8, that could fit the context: all of it made of the tokenizer's longest token."""
    longest = max((len(tokenizer.token(i).encode("utf-8", "replace")) for i in tokenizer.ids()), default=1)
    return context * longest


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
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    context: int,
    reserve: int,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], int]:
    """Prompt ids of the newest part of a conversation that leaves `reserve` tokens for the reply.

    variables: more of them for the chat template, `tools` for example.

    The oldest turns are dropped first, a question together with its answer; a leading system message and the last turn stay.
    Returns (ids, number of dropped turns). Raises ConfigError if the last turn alone does not fit.
    """
    turns = [{**m, "role": str(m["role"]), "content": str(m["content"])} for m in messages]
    for turn in turns:
        check_text(turn["content"], f"the {turn['role']} message")
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    rest = turns[len(system) :]
    budget = context - min(reserve, context // 2)
    dropped = 0
    while True:
        ids = tokenizer.prompt_ids(system + rest, variables)
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
