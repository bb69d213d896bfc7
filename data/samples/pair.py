"""From conversations to training samples: user first, assistant last, the two alternating.

    for sample in make_samples(conversation, PairSection(), ledger): ...

`dialogues` keeps a conversation whole; `pairs` makes one (context, reply) sample per reply, with loss only on that reply;
`preference` keeps a better and a worse reply to one context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..conversation import Conversation, Turn, part_uid
from ..ledger import Ledger
from ..preference import REJECTED, without_rejected
from ..recipe import PairSection


def merge_same_role(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Join neighbouring turns of one role, contents on separate lines. Tool turns stay separate."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role and turn.role != "tool" and merged[-1].loss == turn.loss:
            last = merged[-1]
            name = last.name if last.name == turn.name else None
            thought = "\n\n".join(text for text in (last.reasoning, turn.reasoning) if text) or None
            # Calls of tools are the last lines: those above words become words.
            calls = turn.calls + (0 if turn.said else last.calls) if turn.calls else 0
            merged[-1] = Turn(last.role, f"{last.content}\n{turn.content}", name, last.time, last.loss, thought, calls)
        else:
            merged.append(turn)
    return tuple(merged)


def trim(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """System turns (if they come first), then from the first user turn to the last assistant turn."""
    head = 0
    while head < len(turns) and turns[head].role == "system":
        head += 1
    first = next((i for i in range(head, len(turns)) if turns[i].role == "user"), len(turns))
    last = next((i for i in range(len(turns) - 1, first, -1) if turns[i].role == "assistant"), first - 1)
    body = tuple(turn for turn in turns[first : last + 1] if turn.role != "system")
    return turns[:head] + body if body else ()


def make_samples(conversation: Conversation, config: PairSection, ledger: Ledger) -> Iterator[Conversation]:
    """The samples of one conversation: none, one or (in mode `pairs`) several. Documents pass unchanged."""
    if conversation.is_document:
        ledger.keep()
        yield conversation
        return
    if config.mode == "preference":
        yield from _preference_sample(conversation, ledger)
        return
    conversation = without_rejected(conversation)
    inside = trim(conversation.turns)
    turns = whole = merge_same_role(inside)
    if config.max_turns is not None and len(turns) > config.max_turns:
        turns = trim(turns[: config.max_turns])
        ledger.change("cut at pair.max_turns", conversation.origin)
    replies = sum(turn.role == "assistant" and turn.loss for turn in turns)
    if replies < config.min_replies:
        reason = "no user turn followed by an assistant turn" if replies == 0 else f"fewer than {config.min_replies} replies"
        ledger.drop(reason, f"{conversation.origin}: {' / '.join(t.content for t in conversation.turns[:3])}")
        return
    if joined := len(inside) - len(whole):
        ledger.change("turns of one speaker in a row joined", conversation.origin, joined)
    if outside := len(conversation.turns) - len(inside):
        ledger.change("turns before the first user turn, after the last reply, or of the system later on left out", n=outside)
    thread = str(conversation.meta.get("thread", conversation.uid))
    meta = {**conversation.meta, "thread": thread}
    if config.mode == "dialogues":
        ledger.keep()
        yield replace(conversation, turns=turns, meta=meta)
        return
    system = tuple(turn for turn in turns if turn.role == "system")
    spoken = turns[len(system) :]
    for i, turn in enumerate(spoken):
        if turn.role != "assistant" or not turn.loss:
            continue
        start = max(0, i - config.context_turns)
        while spoken[start].role != "user":
            start += 1
            if start >= i:
                break
        if start >= i:
            ledger.drop("no user turn in pair.context_turns before the reply", conversation.origin)
            continue
        context = tuple(replace(t, loss=False) if t.role == "assistant" else t for t in spoken[start:i])
        origin = f"{conversation.origin}#{i}"
        ledger.keep()
        yield Conversation(part_uid(conversation.uid, i), (*system, *context, turn), conversation.source, origin, meta)


def _preference_sample(conversation: Conversation, ledger: Ledger) -> Iterator[Conversation]:
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
    meta = {**conversation.meta, "thread": str(conversation.meta.get("thread", conversation.uid))}
    ledger.keep()
    yield replace(conversation, turns=(*context, replace(turns[-1], loss=True)), meta=meta)
