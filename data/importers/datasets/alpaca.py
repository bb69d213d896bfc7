"""Alpaca: {"instruction", "input", "output", "system"?, "history"?: [[user, assistant], …]}, a JSON array or JSON lines.

A non-empty input follows the instruction after a blank line. history may be a text that holds such a list (deepctrl), and an
instruction may hold the dialogue so far, `Human:…\\nAssistant:…\\nHuman:…\\nAssistant:` (BELLE).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..records import BadRecordError, Record, read_records, text_of
from .openai_messages import kept_fields, system_turn

EXTRAS = ("input", "context")  # what else belongs to a prompt; Dolly says context
_SO_FAR = re.compile(r"(?:^|\n)(Human|Assistant)[:：][ \t]*")


def recognise(head: bytes, name: str) -> bool:
    """Objects with instruction and output."""
    first = first_object(head)
    return first is not None and {"instruction", "output"} <= set(first)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per record."""
    yield from read_records(json_lines(file, options.encoding, ledger), dialogue, file, source, ledger)


def dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    """Turns of a record."""
    instruction, extra, output = record.get("instruction"), record.get("input") or "", record.get("output")
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(extra, str):
        raise BadRecordError("no instruction or output", sorted(record)[:8])
    turns = history_turns(record.get("history"))
    question = "\n\n".join(part for part in (instruction, extra) if part.strip())
    if instruction.startswith("Human") and (so_far := _said_so_far(question)):
        turns += so_far
    else:
        turns.append(Turn("user", question))
    return [*system_turn(record, turns), *turns, Turn("assistant", output)], kept_fields(record)


def history_turns(history: Any) -> list[Turn]:
    """The dialogue before, of a list of pairs, or of a text that holds one. Raises BadRecordError for anything else."""
    if isinstance(history, str):
        text = history.strip() or "[]"
        try:
            history = json.loads(text)
        except ValueError:
            try:
                history = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError) as error:
                raise BadRecordError("history is not a list of pairs", history) from error
    turns: list[Turn] = []
    for pair in history or ():
        if isinstance(pair, dict):
            pair = [pair.get("query") or pair.get("prompt"), pair.get("response") or pair.get("answer")]
        if not isinstance(pair, list | tuple) or len(pair) < 2:
            raise BadRecordError("history is not a list of pairs", history)
        turns += [Turn("user", text_of(pair[0], "history")), Turn("assistant", text_of(pair[1], "history"))]
    return turns


def _said_so_far(text: str) -> list[Turn]:
    """Turns of `Human:…\\nAssistant:…\\nHuman:…\\nAssistant:`; none if the text is otherwise."""
    parts = _SO_FAR.split(text)
    speakers, texts = parts[1::2], [part.strip() for part in parts[2::2]]
    if parts[0].strip() or len(speakers) < 2 or speakers[-1] != "Assistant" or texts[-1] or speakers[0] != "Human":
        return []
    return [Turn("user" if s == "Human" else "assistant", t) for s, t in zip(speakers[:-1], texts[:-1], strict=True)]
