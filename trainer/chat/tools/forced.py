"""Grammars for replies that must call a tool: what the template prints around a call, with arguments that fit a schema.

    grammar = forced_call(grammars, tokenizer, speech, tools, prompt)

The text around name and arguments is the model's own (data/tokenizer/calls/forms.py), so a forced call reads as a learned one.
Forms whose arguments are not JSON (Qwen3-Coder, GLM-4.5) cannot be forced, which is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from chatmill.config import ConfigError

from ....data.tokenizer.tokenizer import ChatTokenizer
from ...generation.grammar import ANY_OBJECT, WHITESPACE, Grammar, Grammars
from .reply_parts import Speech


def forced_call(
    grammars: Grammars, tokenizer: ChatTokenizer, speech: Speech, tools: Sequence[Mapping[str, Any]], prompt: str
) -> Grammar:
    """One call of one of these tools. prompt: its end, which may have opened or closed a thought. Raises ConfigError."""
    if speech.form is None or speech.form.around is None:
        raise ConfigError("a call cannot be forced: this model does not write arguments as JSON between fixed texts.")
    before, between, after = speech.form.around
    if speech.marks is not None:
        opening, closing = speech.marks
        thought, found, rest = before.partition(closing)
        if found and prompt.rstrip().endswith(closing):  # the prompt has closed it already
            before = rest.lstrip("\n")
        elif prompt.rstrip().endswith(opening) and not thought.strip():
            before = f"\n{closing}\n\n{rest.lstrip(chr(10))}" if found else f"\n{closing}\n\n{before}"
    for end in tokenizer.turn_ends:
        after = after.split(tokenizer.token(end))[0]
    rules = ["start: " + " | ".join(f"call_{k}" for k in range(len(tools)))]
    for k, tool in enumerate(tools):
        function = tool["function"]
        schema = {**(function.get("parameters") or ANY_OBJECT), "x-guidance": WHITESPACE}
        head = _pattern(before + function["name"] + between, tokenizer)
        rules.append(f"call_{k}: {head} arguments_{k} {_pattern(after.rstrip(), tokenizer)}")
        rules.append(f"arguments_{k}: %json {json.dumps(schema, ensure_ascii=False)}")
    return grammars.lark("\n".join(rules))


def _pattern(text: str, tokenizer: ChatTokenizer) -> str:
    """A text as a grammar has it: special tokens by their ids, the rest in quotes.

    llguidance takes added tokens in angle brackets for special ones, whatever the tokenizer says.
    """
    found, plain, at = list[str](), "", 0
    marks = [token for token in tokenizer.added if token in tokenizer.special or (token[0] == "<" and token[-1] == ">")]
    special = sorted(marks, key=len, reverse=True)
    while at < len(text):
        token = next((token for token in special if text.startswith(token, at)), None)
        if token is None:
            plain, at = plain + text[at], at + 1
            continue
        found += [*([json.dumps(plain, ensure_ascii=False)] if plain else []), f"<[{tokenizer.added[token]}]>"]
        plain, at = "", at + len(token)
    return " ".join([*found, *([json.dumps(plain, ensure_ascii=False)] if plain else [])])
