"""A prompt and its reply per JSON object, under whatever usual names, and every other JSON by `columns`.

    {"prompt", "completion"}  texts or messages  ·  {"query", "response", "history"?, "system"?}  ·  {"question", "answer"}
    {"kind", "input", "target"}  Firefly  ·  {"INSTRUCTION", "RESPONSE"}  ·  {"问题", "回答"}  ·  {"chat": {"turn_1": …}}  MOSS

sources.columns maps our fields to keys of the objects, as for tables (data/importers/plain/table.py); dots lead inside of an
object (`data.question`). With `messages` a key holds a list: of texts that take turns, or of objects whose `role` or `sender`
and `content` are named, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Role, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..plain.table import json_rows, usual_names
from ..records import BadRecordError, Record, read_records, text_of
from .alpaca import EXTRAS, history_turns
from .openai_messages import kept_fields, system_turn, turn_of

_PROMPTS = ("instruction", "input", "user")  # besides those of tables, and after them
_REPLIES = ("target", "output")
_MOSS = re.compile(r"^\s*<\|(?:Human|MOSS)\|>[:：]\s?|(?<!\s)\s*<eo[hmtcr]>\s*$")


def recognise(head: bytes, name: str) -> bool:
    """Objects with a prompt and a reply of usual names."""
    first = first_object(head)
    return first is not None and (_names(first) is not None or _moss_turns(first) is not None)


def _names(record: Record) -> tuple[str, str] | None:
    """(key of the prompt, key of the reply) of a record."""
    lower = {str(key).strip().lower(): key for key in record}
    prompt = next((lower[n] for n in (*usual_names("prompt"), *_PROMPTS) if _holds(record.get(lower.get(n, "")))), None)
    reply = next((lower[n] for n in (*usual_names("reply"), *_REPLIES) if _holds(record.get(lower.get(n, "")))), None)
    return None if prompt is None or reply is None or prompt == reply else (prompt, reply)


def _holds(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per object, or as sources.columns says."""
    if options.columns:
        yield from json_rows(json_lines(file, options.encoding, ledger), file, options, source, ledger)
        return
    yield from read_records(json_lines(file, options.encoding, ledger), dialogue, file, source, ledger)


def dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    """Turns of a record."""
    if (moss := _moss_turns(record)) is not None:
        return moss, {"id": record["conversation_id"]} if "conversation_id" in record else {}
    names = _names(record)
    if names is None:
        raise BadRecordError("no prompt or no reply", sorted(record)[:8])
    turns = [*history_turns(record.get("history")), *_said(record[names[0]], "user")]
    extra = next((record[key] for key in EXTRAS if key != names[0] and record.get(key)), None)
    if extra is not None and text_of(extra, "input").strip():
        turns[-1] = Turn("user", f"{turns[-1].content}\n\n{extra}")
    turns += _said(record[names[1]], "assistant")
    if not all(turn.content.strip() for turn in turns):
        raise BadRecordError("empty cell", [turn.content for turn in turns][-2:])
    return [*system_turn(record, turns), *turns], kept_fields(record)


def _said(value: Any, role: Role) -> list[Turn]:
    return [Turn(role, value)] if isinstance(value, str) else [turn_of(message, {}) for message in value]


def _moss_turns(record: Record) -> list[Turn] | None:
    chat = record.get("chat")
    if not isinstance(chat, dict) or not all(isinstance(turn, dict) and "Human" in turn for turn in chat.values()) or not chat:
        return None
    turns: list[Turn] = []
    for turn in chat.values():
        for key, role in (("Human", "user"), ("MOSS", "assistant")):
            text = _MOSS.sub("", text_of(turn.get(key)))
            turns.append(Turn("user" if role == "user" else "assistant", text))
    return turns
