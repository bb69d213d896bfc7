"""Alpaca: {"instruction", "input", "output", "system"?, "history"?: [[user, assistant], …]}, a JSON array or JSON lines.

A non-empty input follows the instruction after a blank line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ...conversation import Conversation, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection


def recognise(head: bytes, name: str) -> bool:
    """Objects with instruction and output."""
    first = first_object(head)
    return first is not None and {"instruction", "output"} <= set(first)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per record."""
    yield from from_records(json_lines(file, options.encoding, ledger), file, source, ledger)


def from_records(
    records: Iterable[tuple[int, dict[str, Any]]], file: RawFile, source: str, ledger: Ledger
) -> Iterator[Conversation]:
    """Dialogues of numbered records, from JSON or from a table."""
    for number, record in records:
        origin = f"{file.label}:{number}"
        instruction, extra, output = record.get("instruction"), record.get("input") or "", record.get("output")
        if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(extra, str):
            ledger.drop("no instruction or output", f"{origin}: {sorted(record)[:8]}")
            continue
        turns = [Turn("system", record["system"])] if record.get("system") else []
        for pair in record.get("history") or ():
            turns += [Turn("user", str(pair[0])), Turn("assistant", str(pair[1]))]
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        turns += [Turn("user", question), Turn("assistant", output)]
        ledger.keep()
        yield Conversation(make_uid(source, origin), tuple(turns), source, origin, {})
