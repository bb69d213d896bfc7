"""One sample per reply, for dialogues that a chat template does not render in one piece as it renders them reply by reply.

    for sample in per_reply(conversation, tokenizer, ledger): ...

Templates of thinking models drop the thoughts of earlier replies, or print an empty thought in the last reply alone. In one
piece, all replies but the last would be learned without their thought, behind prompts that are never sent. So each reply gets a
sample of its own: the dialogue up to it, with loss on this reply alone. Its prompt is the rendering that inference sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..conversation import Conversation, part_uid
from ..ledger import Ledger
from ..tokenizer.budget import TemplateRefusedError
from ..tokenizer.tokenizer import ChatTokenizer, supervised_turns


def up_to(conversation: Conversation, reply: int) -> Conversation:
    """The sample of one reply: the turns up to it, with loss on it alone."""
    before = tuple(replace(t, loss=False) if t.role == "assistant" else t for t in conversation.turns[:reply])
    origin = f"{conversation.origin}#{reply}"
    meta = {**conversation.meta, "thread": str(conversation.meta.get("thread", conversation.uid))}
    turns = (*before, conversation.turns[reply])
    return Conversation(part_uid(conversation.uid, reply), turns, conversation.source, origin, meta)


def in_pieces(conversation: Conversation, tokenizer: ChatTokenizer) -> list[Conversation]:
    """The conversation itself, or a sample per supervised reply where its template asks for it."""
    try:
        whole = tokenizer.one_piece(conversation)
    except (
        TemplateRefusedError
    ):  # a reply that it cannot print is dropped, counted and shown when it is tokenised, not the others
        whole = False
    return [conversation] if whole else [up_to(conversation, i) for i in supervised_turns(conversation)]


def per_reply(conversation: Conversation, tokenizer: ChatTokenizer, ledger: Ledger) -> Iterator[Conversation]:
    """As in_pieces, counted: the conversation itself was kept already."""
    samples = in_pieces(conversation, tokenizer)
    if len(samples) > 1 or samples[0] is not conversation:
        ledger.change("cut into one sample per reply, as the chat template asks", conversation.origin)
        ledger.keep(len(samples) - 1)
    yield from samples
