"""What `chatmill data import|clean|pair RECIPE --out FILE.jsonl` wrote, after people looked at it and perhaps edited it.

    {"uid", "messages": [{"role", "content", "name"?, "time"?, "loss"?, "cut_before"?}, …], "source", "origin", "meta"}

They are OpenAI messages with the lineage of each dialogue beside them. Everything is restored: uids and origins, so that splits
and `data at` still know the dialogue; names, times and loss of the turns; whatever the importer knew. `weight: 0` turns off the
loss of a turn, as in OpenAI's files. `cut_before: true` stands at the message before which cleaning dropped one, so that it
moves with the message when others are added or removed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...cleaning.clean import CUTS
from ...conversation import ROLES, Conversation, from_record, make_uid, to_record
from ...ledger import Ledger
from ...preference import REJECTED
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..records import MALFORMED, BadRecordError, Record, entry_of, text_of, why_bad

FIELDS = frozenset(("uid", "messages", "source", "origin", "meta"))


def recognise(head: bytes, name: str) -> bool:
    """The first line has the fields of a written dialogue."""
    first = first_object(head)
    if first is not None:
        return first.keys() >= FIELDS
    return head.lstrip().startswith(b'{"uid":"') and b'"messages":[{' in head[:200]  # a line longer than the head


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All dialogues as they were; a line that was copied gets a uid of its own."""
    seen: set[str] = set()
    for number, record in json_lines(file, options.encoding, ledger):
        origin, noted = f"{file.label}:{number}", Ledger()
        try:
            found = dialogue(record, origin, noted)
        except MALFORMED as error:
            reason, detail = why_bad(error)
            ledger.drop(reason, f"{origin}: {detail}")
            continue
        if options.name is not None:
            found = replace(found, source=options.name)
        if found.uid in seen:
            noted.change("uid that another line has: a new one is given", origin)
            found = replace(found, uid=make_uid(found.source, origin))
        seen.add(found.uid)
        ledger.add(noted)
        ledger.keep()
        yield found


def written_line(conversation: Conversation) -> str:
    """One line of the file, ending in a newline."""
    record = to_record(conversation)
    for number in record["meta"].pop(CUTS, ()):
        if number < len(record["messages"]):
            record["messages"][number][CUTS] = True
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def dialogue(record: Record, origin: str, ledger: Ledger) -> Conversation:
    """The conversation of a record. Raises what records.MALFORMED lists."""
    messages = record["messages"]
    if not isinstance(messages, list):
        raise BadRecordError("no messages list", type(messages).__name__)
    for message in messages:
        _check(entry_of(message))
    for field in ("uid", "source", "origin"):
        text_of(record[field], field)
    meta = entry_of(record.get("meta") or {})
    if not isinstance(meta.get("authors", []), list) or not isinstance(meta.get(REJECTED, ""), str):
        raise BadRecordError("bad meta", str(meta)[:80])
    cuts = meta.get(CUTS, [])
    if not isinstance(cuts, list) or not all(isinstance(cut, int) for cut in cuts):
        raise BadRecordError("bad meta", str(meta)[:80])
    if marked := [number for number, message in enumerate(messages) if message.get(CUTS)]:
        meta = {**meta, CUTS: sorted({*cuts, *marked})}
    found = from_record({**record, "meta": meta})
    turns = tuple(
        replace(turn, loss=False) if _weight(message) <= 0 else turn
        for turn, message in zip(found.turns, messages, strict=True)
    )
    found = replace(found, turns=turns)
    for message, kept in zip(messages, to_record(found)["messages"], strict=True):
        for field in sorted(message.keys() - kept.keys() - {"weight", "loss", "name", "time", CUTS}):
            ledger.change(f"field of a message not used: {field}", origin)
    for field in sorted(record.keys() - FIELDS):
        ledger.change(f"field of a dialogue not used: {field}", origin)
    return found


def _check(message: dict[str, Any]) -> None:
    if message["role"] not in ROLES:
        raise BadRecordError("unknown role", message["role"])
    text_of(message["content"], "content")
    kinds_of: dict[str, type | tuple[type, ...]] = {
        "name": str, "time": (int, float), "loss": bool, "reasoning_content": str, "calls": int, CUTS: bool,
    }  # fmt: skip
    for field, kinds in kinds_of.items():
        value = message.get(field)
        if value is not None and not isinstance(value, kinds):
            raise BadRecordError(f"bad {field}", value)


def _weight(message: dict[str, Any]) -> float:
    value = message.get("weight")
    return 1.0 if value is None else float(value)
