"""Signal as signal-export (sigexport) writes it: chat.md, or data.json with one message per line.

    [2023-05-01 21:15] Me: hello                                          chat.md (older: [2023-05-01, 21:15])
    {"date": "2023-05-01T21:15:00", "sender": "Me", "body": "hello"}      data.json

Me is whose export it is, and the assistant unless `assistant` names another. Lines of attachments, stickers and quotes
(`> …`) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...cleaning.placeholders import placeholder
from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...raw.limits import MessageLines
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations
from ..records import Record, read_messages, text_of
from .dated import STAMP, moment, seconds_of, stamp

OWNER = "Me"
_SAID = re.compile(rf"^\[{STAMP}\] ([^:\n]{{1,60}}): ?(.*)$", re.S)
_ATTACHED = re.compile(r"^!?\[[^\]\n]*\]\([^)\n]*\)\s*$")
_REACTIONS = re.compile(r"^\(- .* -\)$")


def recognise(head: bytes, name: str) -> bool:
    """chat.md with stamped lines, or objects of date, sender and body."""
    first = first_object(head)
    if first is not None:
        return {"date", "sender", "body"} <= set(first)
    lines = head.decode("utf-8-sig", "ignore").splitlines()[:400]
    return name.lower().endswith(".md") and sum(_SAID.match(line) is not None for line in lines) >= 2


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one chat, cut at silences."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger, owner=OWNER)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message with text, as sent."""
    if first_object(file.head()) is None:
        yield from _lines(file, options, ledger)
        return
    entries = ({**record, "id": number} for number, record in json_lines(file, options.encoding, ledger))
    yield from read_messages(entries, _message, file, ledger)


def _message(entry: Record) -> ChatMessage | str:
    """A message, or why it is left out."""
    text = text_of(entry.get("body") or "")
    if not text.strip() or placeholder(text):
        return "media left out"
    return ChatMessage(text_of(entry.get("sender"), "sender"), text, seconds_of(entry.get("date")), str(entry["id"]))


def _lines(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    found: tuple[int, float | None, str, MessageLines] | None = None
    for number, line in file.text_lines(options.encoding, ledger):
        line = line.rstrip("\r\n").rstrip(" ")
        said = _SAID.match(line)
        when = stamp(said.groups()[:8]) if said else None
        if said and when is not None:
            if found is not None:
                yield from _finished(*found, file, ledger)
            found = (number, moment(*when), said[9], MessageLines([said[10]]))
        elif found is not None:
            found[3].add(line, f"{file.label}:{number}", ledger)
        elif line.strip():
            ledger.change("line before the first message left out", f"{file.label}:{number}: {line}")
    if found is not None:
        yield from _finished(*found, file, ledger)


def _finished(
    number: int, time: float | None, sender: str, lines: list[str], file: RawFile, ledger: Ledger
) -> Iterator[ChatMessage]:
    kept = [line for line in lines if not (_ATTACHED.match(line) or _REACTIONS.match(line))]
    if kept and kept[0].startswith(">"):  # what it answers stands above, quoted
        kept = kept[next((k for k, line in enumerate(kept) if not line.startswith(">")), len(kept)) :]
    body = "\n".join(kept).strip("\n")
    if not body.strip() or placeholder(body):
        ledger.change("media left out", f"{file.label}:{number}: {sender}")
    else:
        yield ChatMessage(sender, body, time, str(number))
