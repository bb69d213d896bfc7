"""WhatsApp "export chat": Android `12/31/20, 9:15 PM - Ann: hi` and iOS `[31.12.20, 21:15:02] Ann: hi`, any locale's dates.

A first pass over the whole file decides whether 3/4/20 is March or April: by a number above 12 somewhere, else by the order in
which time runs forward. Lines without a header continue the message above; headers without a name are service messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations

_MARKS = "\u200e\u200f\u202a\u202b\u202c\ufeff"
_DATE = r"(\d{1,4})[./\-](\d{1,2})[./\-](\d{1,4})\.?"
_TIME = r"(\d{1,2})[:.](\d{2})(?:[:.](\d{2}))?\s*([AaPp])?(?:\.?\s?[Mm]\.?)?"
_GLUE = r",?\s+(?:klo|um|at|à|a las|kl\.?|alle|om)?\s*"
_HEADER = re.compile(rf"^[{_MARKS}\s]*(?:\[{_DATE}{_GLUE}{_TIME}\]\s?|{_DATE}{_GLUE}{_TIME}\s+[-–]\s)(.*)$", re.S)
_NAMED = re.compile(r"^([^:\n]{1,100}?):(?: (.*)|)$", re.S)
_MEDIA = re.compile(
    r"^(<[^<>\n]{2,60}(omitted|omitido|omitida|omessi|omis(es)?|ausgeschlossen|weggelassen|weggelaten|oculto|utelämnad"
    r"|poistettu|pominięto|без медиафайлов|attached[^<>]*)>|<(attached|adjunto|Anhang)[^<>\n]*>"
    r"|(image|video|audio|GIF|sticker|document|Contact card|imagen|Bild|Sticker|photo|vidéo)[^\n]{0,40} "
    r"(omitted|omitida|omitido|weggelassen|absente|omise)"
    r"|.{1,80}\((file attached|archivo adjunto|Datei angehängt|fichier joint)\))$",
    re.I,
)
_SERVICE = re.compile(
    r"end-to-end encrypted|Ende-zu-Ende-verschlüsselt"
    r"|cifrado de extremo a extremo|chiffrés de bout en bout|crittografati end-to-end",
    re.I,
)
Header = tuple[tuple[int, int, int], tuple[int, int, int], str]


def recognise(head: bytes, name: str) -> bool:
    """A header in the first line and another one later."""
    lines = head.decode("utf-8", "ignore").splitlines()
    return (
        bool(lines)
        and _parse(lines[0]) is not None
        and sum(_parse(line) is not None for line in lines[:2000]) >= min(2, len(lines))
    )


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one chat, cut at silences."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message with text, as sent."""
    order = _date_order(file, options.encoding, ledger)
    pending: tuple[int, Header] | None = None
    lines: list[str] = []
    with file.text(options.encoding) as text:
        for number, line in enumerate(text, 1):
            line = line.rstrip("\r\n")
            header = _parse(line)
            if header is None:
                if pending is not None:
                    lines.append(line)
                elif line.strip():
                    ledger.change("line before the first message left out", f"{file.label}:{number}: {line}")
                continue
            if pending is not None:
                yield from _message(pending, lines, order, file, ledger)
            pending, lines = (number, header), []
        if pending is not None:
            yield from _message(pending, lines, order, file, ledger)


def _message(found: tuple[int, Header], more: list[str], order: str, file: RawFile, ledger: Ledger) -> Iterator[ChatMessage]:
    number, (date, clock, rest) = found
    where = f"{file.label}:{number}: {rest}"
    named = _NAMED.match(rest)
    if named is None or _SERVICE.search(rest):
        ledger.change("service line left out", where)
        return
    sender = named[1].strip(_MARKS + " ~\u202f\u00a0")
    body = "\n".join([named[2] or "", *more]).strip(_MARKS + "\n\r")
    if _MEDIA.match(body.strip(_MARKS + " ")):
        ledger.change("media left out", where)
        return
    body = body.removesuffix("\u200e<This message was edited>").removesuffix("<This message was edited>").rstrip(_MARKS)
    yield ChatMessage(sender, body, _seconds(date, clock, order), key=str(number))


def _parse(line: str) -> Header | None:
    match = _HEADER.match(line)
    if match is None:
        return None
    g = match.groups()
    d = g[:7] if g[0] is not None else g[7:14]
    hour = int(d[3])
    if d[6]:
        hour = hour % 12 + (12 if d[6] in "pP" else 0)
    if hour > 23 or int(d[4]) > 59:
        return None
    return (int(d[0]), int(d[1]), int(d[2])), (hour, int(d[4]), int(d[5] or 0)), g[14]


def _date_order(file: RawFile, encoding: str, ledger: Ledger) -> str:
    """`dmy`, `mdy` or `ymd`, from every header of the file."""
    largest, backwards = [0, 0, 0], {"dmy": 0, "mdy": 0}
    last: dict[str, tuple[int, ...]] = {}
    with file.text(encoding) as text:
        for line in text:
            header = _parse(line.rstrip("\r\n"))
            if header is None:
                continue
            a, b, c = header[0]
            largest = [max(x, y) for x, y in zip(largest, (a, b, c), strict=True)]
            for name, key in (("dmy", (c, b, a, *header[1])), ("mdy", (c, a, b, *header[1]))):
                backwards[name] += last.get(name, key) > key
                last[name] = key
    if largest[0] > 31:
        return "ymd"
    if largest[0] > 12 or largest[1] > 12:
        return "dmy" if largest[0] > 12 else "mdy"
    if backwards["dmy"] != backwards["mdy"]:
        return min(backwards, key=lambda name: backwards[name])
    ledger.change("day/month order not certain: day first assumed", file.label)
    return "dmy"


def _seconds(date: tuple[int, int, int], clock: tuple[int, int, int], order: str) -> float | None:
    """Seconds since 1970 as if the phone's clock were UTC, because exports do not name their time zone."""
    year, month, day = (date[order.index(letter)] for letter in "ymd")
    try:
        return datetime(year + (2000 if year < 100 else 0), month, day, *clock, tzinfo=UTC).timestamp()
    except ValueError:
        return None
