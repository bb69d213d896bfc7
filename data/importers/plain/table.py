"""Rows of a table, CSV, JSON lines or Parquet/Arrow, by a map from our fields to its columns.

sources.columns, one of:
    prompt, reply [, system]             one dialogue per row
    text                                 one document per row
    [conversation,] role | sender, content [, time]   one message per row; a conversation's rows may stand anywhere
    messages [, role | sender, content]  a list per row: of texts that take turns, or of objects with these keys
A column may be given by its number, from 1, where the table has no header. Rows of a named conversation stay together unless
sources.gap_minutes is given; rows without one are a chat log, cut at silences (30 minutes) where they have times.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from chatmill.config import ConfigError

from ...conversation import Conversation, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import Place
from ...recipe import SourceSection
from ..datasets import alpaca
from ..labels import role_of
from ..messages import ChatMessage, to_conversation
from ..messengers.dated import seconds_of
from ..rebuild import GAP_MINUTES, by_chat, rebuild
from ..records import BadRecordError, Record, entry_of, read_records, text_of
from ..unread import Unread
from .rows import csv_rows

_USUAL = {
    "prompt": "prompt question query instruction user input 问题 提问 问 用户 输入 指令 質問 질문",
    "reply": "reply response answer completion output assistant 回答 答案 答 回复 答复 助手 输出 答え 답변",
    "text": "text document 文本 正文 内容",
    "conversation": "conversation conversation_id dialogue_id dialog_id thread thread_id topic_id chat_id session_id 会话",
    "role": "role 角色",
    "sender": "sender author speaker from user_id nickname 发送者 发送人 说话人 昵称",
    "content": "content message utterance text body msg 内容 消息 消息内容",
    "time": "time timestamp date createtime created_at datetime 时间 发送时间 日期",
    "system": "system 系统",
    "messages": "",
}


def usual_names(field: str) -> tuple[str, ...]:
    """Common names of a field's column, in lower case."""
    return tuple(_USUAL[field].split())


def column_map(names: list[str], given: Mapping[str, str], label: str) -> dict[str, str]:
    """Our field -> column, from sources.columns or from usual column names."""
    inside = ("role", "sender", "content") if "messages" in given else ()  # keys of the messages, not columns
    wanted = [column for field, column in given.items() if field not in inside]
    missing = [column for column in wanted if column not in names and column.split(".")[0] not in names]
    if missing:
        raise ConfigError(f"{label}: sources.columns names {missing}, the table has {names}")
    if given:
        check_fields(given, label)
        return dict(given)
    lower = {name.strip().lower(): name for name in names}
    found = {field: next((lower[n] for n in usual_names(field) if n in lower), "") for field in _USUAL}
    if found["conversation"] and found["content"] and (found["role"] or found["sender"]):
        keep: tuple[str, ...] = ("conversation", "role", "sender", "content", "time")
    elif found["prompt"] and found["reply"]:
        keep = ("prompt", "reply", "system")
    elif found["time"] and found["sender"] and found["content"]:
        keep = ("sender", "content", "time")
    elif found["text"]:
        keep = ("text",)
    else:
        raise ConfigError(
            f"{label}: the columns {names} have no usual names. Say in the recipe which is which, "
            f"sources: - {{path: …, columns: {{prompt: {json.dumps(names[0] if names else 'x', ensure_ascii=False)}, "
            f"reply: {json.dumps(names[-1] if names else 'y', ensure_ascii=False)}}}}} for a dialogue per row, "
            "{text: …} for a document per row, {conversation: …, sender: …, content: …, time: …} for a message per row. "
            'Where the first row is no header, give numbers: {prompt: "1", reply: "2"}.'
        )
    return {field: found[field] for field in keep if found[field]}


def check_fields(given: Mapping[str, str], label: str) -> None:
    """ConfigError unless sources.columns has known fields that make a dialogue, a message or a document."""
    if unknown := sorted(set(given) - set(_USUAL)):
        raise ConfigError(f"{label}: sources.columns has {unknown}; known fields: {', '.join(_USUAL)}")
    whole = {"prompt", "reply"} <= set(given) or "text" in given or "messages" in given
    if not whole and not ("content" in given and ("role" in given or "sender" in given)):
        raise ConfigError(
            f"{label}: sources.columns has {sorted(given)}; expected prompt and reply, or text, or messages, or content with "
            "role or sender."
        )


def rows_to_conversations(
    rows: Iterator[tuple[Place, Record]],
    columns: Mapping[str, str],
    file: RawFile,
    options: SourceSection,
    source: str,
    ledger: Ledger,
) -> Iterator[Conversation]:
    """Dialogues or documents of numbered rows."""
    if "content" in columns and "messages" not in columns:
        yield from _grouped(rows, columns, file, options, source, ledger)
        return

    def dialogue(row: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
        if "messages" in columns:
            return _listed(row, columns, options.assistant), {}
        cell = {field: _cell(row, column) for field, column in columns.items()}
        if not all(cell[field].strip() for field in ("prompt", "reply", "text") if field in cell):
            raise BadRecordError("empty cell", list(cell.values())[:2])
        if "text" in cell:
            return [Turn("assistant", cell["text"])], {"document": True}
        turns = [Turn("system", cell["system"])] if cell.get("system") else []
        return [*turns, Turn("user", cell["prompt"]), Turn("assistant", cell["reply"])], {}

    yield from read_records(rows, dialogue, file, source, ledger)


def _cell(row: Mapping[str, Any], column: str) -> str:
    """A cell as text; dots lead inside of an object. Raises BadRecordError for a list or an object."""
    value = value_at(row, column)
    if isinstance(value, list | dict):
        raise BadRecordError(f"column {column} is not a text", type(value).__name__)
    return "" if value is None else str(value)


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of `a.b` inside of the object in column a."""
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for key in column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _listed(row: Record, columns: Mapping[str, str], assistant: str | None) -> list[Turn]:
    """Turns of a row whose messages are a list."""
    items = value_at(row, columns["messages"])
    if not isinstance(items, list) or not items:
        raise BadRecordError("no list of messages", columns["messages"])
    system = _cell(row, columns["system"]) if "system" in columns else ""
    turns = [Turn("system", system)] if system.strip() else []
    speaker = columns.get("role") or columns.get("sender")
    if speaker is None or "content" not in columns:
        return turns + [Turn("user" if k % 2 == 0 else "assistant", text_of(item)) for k, item in enumerate(items)]
    said = [(_cell(entry, speaker), _cell(entry, columns["content"])) for entry in map(entry_of, items)]
    first = said[0][0]
    for sender, text in said:
        role = role_of(sender) if assistant is None else None
        replies = sender == assistant if assistant is not None else sender != first
        turns.append(Turn(role or ("assistant" if replies else "user"), text))
    return turns


def _grouped(
    rows: Iterator[tuple[Place, Record]],
    columns: Mapping[str, str],
    file: RawFile,
    options: SourceSection,
    source: str,
    ledger: Ledger,
) -> Iterator[Conversation]:
    """One message per row: rows of a conversation put together, in order of time where all have one."""
    speaker = columns["role"] if "role" in columns else columns["sender"]

    def messages() -> Iterator[tuple[str, ChatMessage]]:
        unread = Unread(ledger)
        for number, row in rows:
            try:
                sender, text = _cell(row, speaker), _cell(row, columns["content"])
                chat = _cell(row, columns["conversation"]) if "conversation" in columns else ""
            except BadRecordError as error:
                ledger.change(f"{error.reason} left out", f"{file.label}:{number}: {error.detail}")
                continue
            time = seconds_of(value_at(row, columns["time"])) if "time" in columns else None
            if not unread.is_known(row):
                unread.note(row, (sender, text, chat), f"{file.label}:{number}")
            yield chat, ChatMessage(sender, text, time, str(number))

    merge_s = None if options.merge_minutes is None else options.merge_minutes * 60
    named = "conversation" in columns
    for chat, log in by_chat(messages()):
        cut = options.gap_minutes if named else options.gap_minutes or GAP_MINUTES
        meta = {"conversation": chat} if named else {}
        for group in rebuild(log, cut * 60) if cut else [list(log)]:
            origin = f"{file.label}:{group[0].key}"
            roles = [role_of(message.sender) for message in group]
            if options.assistant is None and all(roles) and ("role" in columns or "assistant" in roles):
                turns = tuple(Turn(role, m.text, time=m.time) for role, m in zip(roles, group, strict=True) if role)
                ledger.keep()
                yield Conversation(make_uid(source, origin), turns, source, origin, meta)
                continue
            found = to_conversation(
                group, source=source, origin=origin, ledger=ledger, assistant=options.assistant, merge_s=merge_s, meta=meta,
                people=True,
            )  # fmt: skip
            if found is not None:
                yield found


def json_rows(
    records: Iterable[tuple[Place, Record]], file: RawFile, options: SourceSection, source: str, ledger: Ledger
) -> Iterator[Conversation]:
    """Objects of JSON lines as rows, by sources.columns."""
    check_fields(options.columns, file.label)
    yield from rows_to_conversations(iter(records), options.columns, file, options, source, ledger)


def recognise(head: bytes, name: str) -> bool:
    """By name: .csv and .tsv."""
    return name.lower().endswith((".csv", ".tsv"))


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """CSV or TSV, with a header row unless sources.columns gives numbers; cells may hold line feeds; rows count records."""
    numbers = [int(column) for column in options.columns.values() if column.isdecimal() and column.isascii()]
    header, rows = csv_rows(file, options.encoding, ledger)
    if not header:
        ledger.drop("empty table", file.label)
        return
    if numbers and len(numbers) == len(options.columns) and not set(options.columns.values()) <= set(header):
        names = [str(n) for n in range(1, len(header) + 1)]
        header, rows = csv_rows(file, options.encoding, ledger, names)
    columns = column_map(header, options.columns, file.label)
    if not options.columns and "prompt" in columns:  # what belongs to the prompt may stand in a column beside it
        lower = {name.strip().lower(): name for name in header}
        extra = next((lower[n] for n in alpaca.EXTRAS if n in lower and lower[n] != columns["prompt"]), None)
        if extra is not None:
            rows = ((number, _with_extra(row, columns["prompt"], extra)) for number, row in rows)
    yield from rows_to_conversations(rows, columns, file, options, source, ledger)


def _with_extra(row: dict[str, str], prompt: str, extra: str) -> dict[str, str]:
    return row | {prompt: f"{row[prompt]}\n\n{row[extra]}"} if row[extra].strip() and row[prompt].strip() else row


def json_cell(value: Any) -> Any:
    """A cell that holds JSON text, decoded; anything else unchanged."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
