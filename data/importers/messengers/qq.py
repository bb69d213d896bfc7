"""QQ's "export messages" as text: `2023-03-07 11:22:33 阿杰(10001)`, then the message, then a blank line.

A group's headers may hold `<name@example.com>` in place of the number and a title before the name, `【管理员】阿杰(10001)`.
The account tells the speakers apart, whatever they call themselves later; `assistant` names one by name or number. 我 is
whose export it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...cleaning.placeholders import placeholder
from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations
from .dated import block_headers, blocks, moment

OWNER = "我"
_TITLE = "消息记录（此消息记录为文本格式"
_RANK = re.compile(r"^【[^】]{1,12}】(?=.)")
_SYSTEM = ("10000", "1000000")  # QQ's own accounts
_SECTION = re.compile(r"\n?^={8,}\s*$.*", re.M | re.S)  # the title of the next chat, where one file holds several


def recognise(head: bytes, name: str) -> bool:
    """QQ's title, or headers with an account."""
    if _TITLE in head[:400].decode("utf-8", "ignore"):
        return True
    headers = block_headers(head)
    return len(headers) >= 2 and sum(header.account is not None for header in headers) * 2 > len(headers)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one chat, cut at silences."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger, owner=OWNER)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message with text, as sent."""
    names: dict[str, str] = {}
    for block in blocks(file, options.encoding, ledger):
        name, account = _RANK.sub("", block.header.name), block.header.account
        where = f"{file.label}:{block.number}: {block.text}"
        if account in _SYSTEM or name == "系统消息":
            ledger.change("service line left out", where)
            continue
        text = _SECTION.sub("", block.text).strip("\n")
        if placeholder(text):
            ledger.change("media left out", where)
            continue
        if account is not None and account not in names:
            names[account] = name if name not in names.values() else f"{name} ({account})"
        sender = names.get(account or "", name)
        if options.assistant is not None and options.assistant in (name, account):
            sender = options.assistant
        yield ChatMessage(sender, text, moment(*block.header.when), str(block.number))
