"""WeChat chats as the usual programs write them: WeClone and MemoTrace (CSV), WeFlow (JSON), MemoTrace or copied text.

    id,MsgSvrID,type_name,is_sender,talker,room_name,msg,src,CreateTime            WeClone
    localId,TalkerId,Type,SubType,IsSender,CreateTime,Status,StrContent,…          MemoTrace (留痕)
    {"weflow": …, "session": …, "messages": [{createTime, type, content, isSend, senderDisplayName}]}
    2024-10-04 11:42:01 小红  or  小红 2023/09/16 下午2:51, then the message, then a blank line

Only texts are read; pictures, voice, recalled messages and WeChat's own lines are counted. Whose export it is (is_sender, 我)
is the assistant, unless `assistant` names another. A CSV with several chats is taken apart, and each is cut at silences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...cleaning.placeholders import placeholder
from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_fields import object_items
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..plain.rows import csv_rows, header_of
from ..rebuild import chats, conversations
from ..records import MALFORMED, entry_of, why_bad
from ..unread import Unread
from .dated import block_headers, blocks, moment, names_repeat, seconds_of

OWNER = "我"
_WECLONE = {"is_sender", "msg", "type_name"}
_MEMOTRACE = {"IsSender", "StrContent", "Type"}
_TEXT = ("", "文本", "文本消息", "1", "text", "引用", "引用消息", "引用回复", "引用文本")
_NOTICES = ("系统通知", "系统消息", "10000", "10002", "拍一拍", "system")


def recognise(head: bytes, name: str) -> bool:
    """The columns of the CSVs, WeFlow's keys, or text in which a few speakers' headers stand below blank lines."""
    if name.lower().endswith(".csv"):
        columns = set(header_of(head))
        return columns >= _WECLONE or columns >= _MEMOTRACE
    if head.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{":
        return b'"messages"' in head and (b'"weflow"' in head[:2000] or (b'"isSend"' in head and b'"createTime"' in head))
    headers = block_headers(head)
    return names_repeat(headers) and all(header.account is None for header in headers)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of all chats in the file."""
    if file.stem.lower().endswith(".csv"):
        yield from chats(messages(file, options, ledger), file, options, source, ledger, owner=OWNER)
        return
    log = (message for _, message in messages(file, options, ledger))
    yield from conversations(log, file, options, source, ledger, owner=OWNER)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[tuple[str, ChatMessage]]:
    """(chat, message) of every message with text."""
    if file.stem.lower().endswith(".csv"):
        entries: Iterator[tuple[int, Any]] = csv_rows(file, options.encoding, ledger)[1]
    elif file.head(64).lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{":
        entries = enumerate(
            (value for name, value in object_items(file, {"messages"}, options.encoding) if name == "messages"), 1
        )
    else:
        yield from _texts(file, options, ledger)
        return
    unread = Unread(ledger)
    for number, entry in entries:
        where = f"{file.label}:{number}"
        try:
            kind, chat, message = _entry(entry_of(entry), number, options)
        except MALFORMED as error:
            bad, detail = why_bad(error)
            ledger.change(f"{bad} left out", f"{where}: {detail}")
            continue
        if reason := _why_not_said(kind, message.text):
            ledger.change(f"{reason} left out", f"{where}: {kind} {message.text}")
        else:
            if not unread.is_known(entry):
                unread.note(entry, (message.text, message.sender, chat), where)
            yield chat, message


def _why_not_said(kind: str, text: str) -> str | None:
    """What an entry is instead of words that somebody wrote."""
    instead = placeholder(text)
    if kind in _NOTICES or instead in ("notice", "deleted"):
        return "service line"
    return "media" if kind not in _TEXT or instead or text.lstrip().startswith(("<?xml", "<msg>")) else None


def _entry(entry: Mapping[str, Any], number: int, options: SourceSection) -> tuple[str, str, ChatMessage]:
    """(kind, chat, message) of a row or object."""

    def first(*names: str) -> str:
        return next((str(entry[name]) for name in names if entry.get(name) not in (None, "")), "")

    kind = first("type_name", "Type", "type")
    if kind == "49":  # MemoTrace: replies (57) are texts, the rest are links, files and so on
        kind = "引用" if first("SubType") == "57" else "49"
    mine = first("is_sender", "IsSender", "isSend").lower() in ("1", "true", "1.0")
    account = first("talker", "Sender", "senderUsername")
    name = first("Remark", "NickName", "senderDisplayName") or account
    sender = OWNER if mine else name or "?"
    if options.assistant is not None and options.assistant in (account, name, *(("我", "me") if mine else ())):
        sender = options.assistant
    time = seconds_of(entry.get("CreateTime") or entry.get("createTime") or entry.get("StrTime"))
    text = first("msg", "StrContent", "content")
    return kind, first("room_name", "TalkerId"), ChatMessage(sender, text, time, str(number))


def _texts(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[tuple[str, ChatMessage]]:
    for block in blocks(file, options.encoding, ledger):
        where = f"{file.label}:{block.number}: {block.text}"
        if reason := _why_not_said("", block.text):
            ledger.change(f"{reason} left out", where)
        else:
            yield "", ChatMessage(block.header.name, block.text, moment(*block.header.when), str(block.number))
