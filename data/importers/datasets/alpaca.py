"""Alpaca: {"instruction", "input", "output", "system"?, "history"?: [[user, assistant], …]}, a JSON array or JSON lines.

A non-empty input follows the instruction after a blank line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..records import BadRecordError, Record, read_records


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
    turns = [Turn("system", record["system"])] if record.get("system") else []
    for pair in record.get("history") or ():
        turns += [Turn("user", str(pair[0])), Turn("assistant", str(pair[1]))]
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [*turns, Turn("user", question), Turn("assistant", output)], {}
