"""From conversations to training samples: user first, assistant last, the two alternating.

    for sample in make_samples(conversation, PairSection(), ledger): ...

A conversation is cut where cleaning dropped a turn, so that what stood around it does not become one turn.
`dialogues` keeps a conversation whole; `pairs` makes one (context, reply) sample per reply, with loss only on that reply;
`preference` keeps a better and a worse reply to one context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from ..cleaning.clean import CUTS
from ..conversation import Conversation, Turn, part_uid
from ..ledger import Ledger
from ..preference import REJECTED, without_rejected
from ..recipe import PairSection

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def merge_same_role(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Join neighbouring turns of one role, contents on separate lines. Tool turns stay separate."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role and turn.role != "tool" and merged[-1].loss == turn.loss:
            last = merged[-1]
            name = last.name if last.name == turn.name else None
            thought = "\n\n".join(text for text in (last.reasoning, turn.reasoning) if text) or None
            # Calls of tools are the last lines: those above words become words.
            keeps = bool(turn.calls and not turn.said)
            calls = turn.calls + (last.calls if keeps else 0) if turn.calls else 0
            ids = (*_ids(last), *_ids(turn)) if keeps and last.calls else turn.call_ids
            merged[-1] = Turn(
                last.role, f"{last.content}\n{turn.content}", name, last.time, last.loss, thought, calls,
                ids if any(ids) else (), None, last.thought_loss and turn.thought_loss,
            )  # fmt: skip
        else:
            merged.append(turn)
    return tuple(merged)


def _ids(turn: Turn) -> tuple[str, ...]:
    """An id for every call of a turn; empty texts where it has none."""
    return turn.call_ids or ("",) * turn.calls


def trim(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """System turns (if they come first), then from the first user turn to the last assistant turn."""
    head = 0
    while head < len(turns) and turns[head].role == "system":
        head += 1
    first = next((i for i in range(head, len(turns)) if turns[i].role == "user"), len(turns))
    last = next((i for i in range(len(turns) - 1, first, -1) if turns[i].role == "assistant"), first - 1)
    body = tuple(turn for turn in turns[first : last + 1] if turn.role != "system")
    return turns[:head] + body if body else ()


def parts(conversation: Conversation) -> list[tuple[int, tuple[Turn, ...]]]:
    """(first turn, turns) of the pieces into which dropped turns cut a conversation, system turns at the head of each.

    A turn that was dropped in cleaning, and a message of the system between two turns of one role, must not join its
    neighbours into one turn.
    """
    head = 0
    while head < len(conversation.turns) and conversation.turns[head].role == "system":
        head += 1
    cuts, found = set(conversation.meta.get(CUTS, ())), list[tuple[int, list[Turn]]]()
    interrupted = False
    for i, turn in enumerate(conversation.turns[head:], head):
        if turn.role == "system":
            interrupted = True
            continue
        if not found or i in cuts or (interrupted and found[-1][1][-1].role == turn.role):
            found.append((i, []))
        found[-1][1].append(turn)
        interrupted = False
    system = conversation.turns[:head]
    return [(start, (*system, *turns)) for start, turns in found] or [(0, system)]


def make_samples(conversation: Conversation, config: PairSection, ledger: Ledger) -> Iterator[Conversation]:
    """The samples of one conversation: none, one or several; those without a system message get config.system.

    Documents pass unchanged.
    """
    for sample in _samples(conversation, config, ledger):
        if config.system is not None and not sample.is_document and sample.turns[0].role != "system":
            ledger.change("pair.system put before the dialogue")
            sample = replace(sample, turns=(Turn("system", config.system), *sample.turns))
        yield sample if config.thinking == "learn" else _without_learned_thoughts(sample, config, ledger)


def _without_learned_thoughts(sample: Conversation, config: PairSection, ledger: Ledger) -> Conversation:
    """The sample with thoughts that are read but not learned, or without them."""
    turns, found = list[Turn](), 0
    for turn in sample.turns:
        inside = _THOUGHT.match(turn.content) if turn.role == "assistant" and turn.reasoning is None else None
        if inside is not None and turn.content[inside.end() :].strip():
            turn = replace(turn, reasoning=inside[1].strip() or None, content=turn.content[inside.end() :])
        if turn.reasoning is not None:
            found += 1
            turn = replace(turn, reasoning=None) if config.thinking == "drop" else replace(turn, thought_loss=False)
        turns.append(turn)
    if found:
        done = "dropped" if config.thinking == "drop" else "read, not learned"
        ledger.change(f"thought {done}, as pair.thinking asks", sample.origin, found)
    return replace(sample, turns=tuple(turns)) if found else sample


def _samples(conversation: Conversation, config: PairSection, ledger: Ledger) -> Iterator[Conversation]:
    if conversation.is_document:
        ledger.keep()
        yield conversation
        return
    pieces = parts(conversation)
    meta = {key: value for key, value in conversation.meta.items() if key != CUTS}
    meta["thread"] = str(meta.get("thread", conversation.uid))
    if config.mode == "preference":
        yield from _preference_sample(replace(conversation, turns=pieces[-1][1], meta=meta), ledger)
        return
    conversation = replace(without_rejected(conversation), meta={k: v for k, v in meta.items() if k != REJECTED})
    samples, reasons, joined, said = list[Conversation](), list[str](), 0, 0
    for k, (start, turns) in enumerate(pieces):
        inside = trim(turns)
        whole = merge_same_role(inside)
        piece = replace(conversation, turns=whole)
        if k:
            piece = replace(piece, uid=part_uid(piece.uid, f"from {start}"), origin=f"{piece.origin}@{start}")
        found = list(_samples_of(piece, config, ledger, reasons))
        if found:
            joined += len(inside) - len(whole)
            said += sum(turn.role != "system" for turn in inside)
        samples += found
    if not samples:
        if reasons:
            ledger.drop(reasons[0], f"{conversation.origin}: {' / '.join(t.content for t in conversation.turns[:3])}")
        return
    if len(pieces) > 1:
        ledger.change("cut where a turn was dropped", conversation.origin, len(pieces) - 1)
    if joined:
        ledger.change("turns of one speaker in a row joined", conversation.origin, joined)
    head = len(pieces[0][1]) - sum(turn.role != "system" for turn in pieces[0][1])
    if outside := len(conversation.turns) - head - said:
        ledger.change("turns before the first user turn, after the last reply, or of the system later on left out", n=outside)
    yield from samples


def _samples_of(conversation: Conversation, config: PairSection, ledger: Ledger, reasons: list[str]) -> Iterator[Conversation]:
    """The samples of one piece of a conversation; where there is none, the reason is added."""
    turns = conversation.turns
    if config.max_turns is not None and len(turns) > config.max_turns:
        turns = trim(turns[: config.max_turns])
        ledger.change("cut at pair.max_turns", conversation.origin)
    replies = sum(turn.role == "assistant" and turn.loss for turn in turns)
    if replies < config.min_replies:
        few = f"fewer than {config.min_replies} replies"
        reasons.append("no user turn followed by an assistant turn" if replies == 0 else few)
        return
    if config.mode == "dialogues":
        ledger.keep()
        yield replace(conversation, turns=turns)
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
        ledger.keep()
        sample = replace(conversation, turns=(*system, *context, turn), origin=f"{conversation.origin}#{i}")
        yield replace(sample, uid=part_uid(conversation.uid, i))


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
