"""An independent proof of a dialogue's loss mask: from renderings and token ids alone.

    find_fault(dialogue, messages, supervised=[1, 3], tools=Tools(...)) -> None, or what is wrong

It shares nothing with data/tokenizer/replies.py: it has no markers, no stop ids and no skeletons. For every supervised reply it
renders the dialogue up to that reply and demands of the ids that

    they begin with the ids that inference sends as the prompt for the reply;
    then come the ids of what the template prints after that prompt, with the whole content of the reply, and one token that
    ends a turn: everything behind it in that rendering is blank or such a token again;
    exactly these carry loss, but for the thought with which a `quiet` reply begins.

So no part of another turn can carry loss, and no part of the reply can miss it. Where a template prints a last reply without
its thought (data/tokenizer/replies.py says which do), the text of the supervised ids must be the content itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..conversation import TokenizedDialogue
from .template import Message


@dataclass(frozen=True)
class Tools:
    """What a tokenizer can do, apart from making masks. tokens: strings of all special and added tokens."""

    render: Callable[..., str]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    prompt_ids: Callable[[Sequence[Message]], list[int]]
    tokens: Collection[str]


def find_fault(
    dialogue: TokenizedDialogue,
    messages: Sequence[Message],
    supervised: Sequence[int],
    tools: Tools,
    quiet: Collection[int] = (),
) -> str | None:
    """None if the mask is right, else what is wrong with it. quiet: replies whose thought is read, not learned."""
    ids, left = dialogue.ids.tolist(), dialogue.loss_mask.copy()
    token = re.compile("|".join(re.escape(t) for t in sorted(tools.tokens, key=lambda t: (-len(t), t)) if t.strip()) or "(?!)")
    starts = {i: tools.prompt_ids(messages[:i]) for i in supervised}
    begins = {len(prompt) for prompt in starts.values()}
    for i in supervised:
        prompt, at = starts[i], len(starts[i])
        if ids[:at] != prompt:
            return f"turn {i}: the prompt sent for it is not how the dialogue's tokens begin"
        text = tools.render(messages[:i], add_generation_prompt=True)
        loud = at + (_quiet_tokens(dialogue, at, messages[i], tools) if i in quiet else 0)
        for said, end in _said(messages, i, text, token, tools):
            after = tools.encode(said + end)
            if ids[at : at + len(after)] != after:  # a tokenizer that cannot be cut puts a blank before every text
                after = tools.encode(text + said + end)[at:]
            stop = at + len(after)
            ends = stop == len(ids) or not dialogue.loss_mask[stop] or stop in begins
            if ids[at:stop] == after and dialogue.loss_mask[loud:stop].all() and ends:
                left[at:stop] = False
                break
        else:
            stop = _run_end(dialogue, loud, begins)
            if i != len(messages) - 1 or not _is_content(messages, text, ids[at:stop], token, tools):
                shown = tools.decode(ids[at:stop])
                return f"turn {i}: the tokens with loss are not its content and one end-of-turn token, but {shown[:120]!r}"
            left[at:stop] = False
    wrong = np.flatnonzero(left)
    return (
        f"{len(wrong)} tokens outside the supervised replies carry loss, the first is token {wrong[0]}" if len(wrong) else None
    )


def _said(messages: Sequence[Message], i: int, prompt: str, token: re.Pattern[str], tools: Tools) -> Iterator[tuple[str, str]]:
    """(text, end-of-turn token) that the template prints for message i behind its prompt; several where it is unclear."""
    text = tools.render(messages[: i + 1])
    if not text.startswith(prompt):
        return
    opened = re.search(r"<\w+>\s*$", prompt)
    tail, whole = text[len(prompt) :], _squeeze(messages[i]["content"])
    whole = whole.removeprefix(_squeeze(opened[0])) if opened else whole  # the prompt has said it
    others = set[str]()
    if i + 1 < len(messages):  # before another turn a reply may end as a user's turn does
        asked = tools.render(messages[:i])
        others = {match[0] for match in token.finditer(asked) if _only_tokens(asked[match.start() :], token)}
    calls = messages[i].get("tool_calls", ())
    for match in token.finditer(tail):
        said, more = tail[: match.start()], tail[match.end() :].strip()
        if calls and (more or any(call["function"]["name"] not in said for call in calls)):
            continue  # a call may be written with tokens: only the last one ends the turn
        if whole in _squeeze(said) and _only_tokens(tail[match.start() :], token):
            for end in (match[0], *sorted(others - {match[0]})):
                yield said, end


def _is_content(messages: Sequence[Message], prompt: str, ids: list[int], token: re.Pattern[str], tools: Tools) -> bool:
    """Do these ids say the last message, a thinking model's reply, thought included, and one token after it?"""
    said, end = _squeeze(tools.decode(ids[:-1])), tools.decode(ids[-1:])
    last, opened = messages[-1], re.search(r"<(\w+)>\s*$", prompt)
    whole, thought = _squeeze(last["content"]), _squeeze(last.get("reasoning_content") or "")
    allowed = {whole} if opened is None else {whole.removeprefix(f"<{opened[1]}>".casefold())}
    if opened is not None and last.get("tool_calls"):
        text, start = tools.render(messages), prompt[: opened.start()]
        printed = text[len(start) :].rstrip()
        allowed = (
            {f"{thought}</{opened[1]}>".casefold() + _squeeze(printed.removesuffix(end))} if text.startswith(start) else set()
        )
    elif opened is not None and f"</{opened[1]}>" not in last["content"]:
        closing = f"{thought}</{opened[1]}>".casefold()
        allowed = {closing + whole} if not whole.startswith(f"<{opened[1]}>".casefold()) else allowed
    return bool(ids) and said in allowed and token.fullmatch(end) is not None


def _quiet_tokens(dialogue: TokenizedDialogue, at: int, message: Message, tools: Tools) -> int:
    """Number of tokens without loss with which a reply begins; 0 unless they hold its thought and nothing of its words."""
    stop = at
    while stop < len(dialogue.ids) and not dialogue.loss_mask[stop]:
        stop += 1
    said, after = (_squeeze(tools.decode(part.tolist())) for part in (dialogue.ids[at:stop], dialogue.ids[stop:]))
    thought, words = _squeeze(message.get("reasoning_content") or ""), _squeeze(message["content"])
    is_right = bool(thought) and thought in said and after.startswith(words)
    return stop - at if is_right or (message.get("tool_calls") and thought in said) else 0


def _run_end(dialogue: TokenizedDialogue, at: int, begins: Collection[int]) -> int:
    stop = at
    while stop < len(dialogue.ids) and dialogue.loss_mask[stop] and (stop == at or stop not in begins):
        stop += 1
    return stop


def _only_tokens(text: str, token: re.Pattern[str]) -> bool:
    return not token.sub("", text).strip()


def _squeeze(text: str) -> str:
    return "".join(text.split()).casefold()
