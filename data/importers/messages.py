"""Chat messages between people, and how they become turns.

Importers of chat logs yield groups of ChatMessage; `to_conversation` gives the speakers their roles and merges what one of them
sent in a row. Role rule: a named sender is the assistant; or those whose names say so (`助手`, `Support`); or, where the export
says whose it is, its owner; or else whoever does not speak first (the one who replies).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cleaning.clean import CUTS
from ..conversation import Conversation, Turn, make_uid
from ..ledger import Ledger
from .labels import role_of


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message as sent. time: seconds since 1970 or None; key: id in the raw file; reply_to, thread: keys or None."""

    sender: str
    text: str
    time: float | None = None
    key: str = ""
    reply_to: str | None = None
    thread: str | None = None


def to_conversation(
    messages: Sequence[ChatMessage],
    *,
    source: str,
    origin: str,
    ledger: Ledger,
    assistant: str | None = None,
    owner: str | None = None,
    merge_s: float | None = None,
    meta: Mapping[str, Any] | None = None,
    people: bool = False,
) -> Conversation | None:
    """Turns of two sides; None (and a counted reason) if there is no exchange.

    owner: the sender whose export it is, where it says so. merge_s: messages of one sender further apart than this stay
    separate turns of the same role (None: always merged). people: a chat between people, whose speakers the ledger counts where
    nothing but the order of speaking decides who is the assistant.
    """
    spoken = [m for m in messages if m.text.strip()]
    if len(spoken) < len(messages):
        ledger.change("empty messages left out", f"{origin}", len(messages) - len(spoken))
    senders = list(dict.fromkeys(m.sender for m in spoken))
    if len(senders) < 2:
        ledger.drop("one speaker only" if senders else "no messages", f"{origin}: {spoken[0].text if spoken else ''}")
        return None
    if assistant is not None and assistant not in senders:
        ledger.drop("the assistant does not speak", f"{origin}: {', '.join(senders[:5])}")
        return None
    known = {assistant} if assistant is not None else _known_helpers(senders, owner)
    helper = known or set(senders[1:])
    turns, cuts, last = list[Turn](), list[int](), ""
    silent = set[str]()  # who sent an empty message since the last one
    for message in messages:
        if not message.text.strip():
            silent.add(message.sender)
            continue
        if turns and silent - {last, message.sender}:  # what stands around the empty message is not said in a row
            cuts, last = [*cuts, len(turns)], ""
        silent.clear()
        role = "assistant" if message.sender in helper else "user"
        near = (
            merge_s is None
            or message.time is None
            or not turns
            or turns[-1].time is None
            or message.time - turns[-1].time <= merge_s
        )
        if turns and message.sender == last and near:
            turns[-1] = Turn(turns[-1].role, turns[-1].content + "\n" + message.text, message.sender, turns[-1].time)
        else:
            turns.append(Turn("assistant" if role == "assistant" else "user", message.text, message.sender, message.time))
        last = message.sender
    if people and not known:
        for turn in turns:
            roles = ledger.speakers.setdefault(str(turn.name), {})
            roles[turn.role] = roles.get(turn.role, 0) + 1
    ledger.keep()
    found = {**(meta or {}), "authors": senders} | ({CUTS: cuts} if cuts else {})
    return Conversation(make_uid(source, origin), tuple(turns), source, origin, found)


def _known_helpers(senders: Sequence[str], owner: str | None) -> set[str]:
    """Who is the assistant, of two or more senders in the order in which they spoke first; empty where nothing says so."""
    # A single letter is a name as often as a label (A and Q are labels where every speaker has one).
    roles = {sender: role_of(sender) if len(sender.strip()) > 1 or not sender.isascii() else None for sender in senders}
    if labelled := {sender for sender, role in roles.items() if role == "assistant"}:
        return labelled if len(labelled) < len(senders) else set(senders[1:])
    if users := {sender for sender, role in roles.items() if role == "user"}:
        return set(senders) - users or set(senders[1:])
    if owner is not None and owner in senders:
        return {owner}
    return set()
