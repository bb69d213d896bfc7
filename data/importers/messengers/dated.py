"""Dates and times as chat programs print them beside a speaker's name, in any locale, and exports made of such headers.

    2023/5/1 下午9:15 · [31.12.20, 21:15:02] · 2023. 5. 1. 오후 9:15 · 20/6/2023 8:28 p. m. · 2023年5月1日 21:15

`moment` gives seconds since 1970 as if the phone's clock were UTC, because exports do not name their time zone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from datetime import date as day_of

from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.limits import MessageLines

MARKS = "\u200e\u200f\u202a\u202b\u202c\ufeff"
_AM = "上午|凌晨|清晨|早上|午前|오전|π\\.?μ\\.?|ÖÖ|SA|PG|पूर्वाह्न|ص|de\\."
_PM = "下午|中午|晚上|傍晚|午後|오후|μ\\.?μ\\.?|ÖS|CH|PTG|अपराह्न|م|du\\."
_NOON = rf"(?:[AaPp]\.?[\s\u202f\u00a0]?[Mm]\b\.?|{_AM}|{_PM})"
DATE = r"(\d{1,4})\s?[./\-年년]\s?(\d{1,2})\s?[./\-月월]\s?(\d{1,4})\s?(?:[.日일号]|г\.)?"
TIME = rf"({_NOON})?\s*(\d{{1,2}})[:.：](\d{{2}})(?:[:.：](\d{{2}}))?\s*({_NOON})?"
LONGEST_HEADER = 300  # characters of a line with a date, a time and a name
GLUE = r"[,،]?\s+(?:klo|um|at|à|a las|às|kl\.?|alle|om|o|в|saat)?\s*"
STAMP = DATE + GLUE + TIME  # eight groups
Stamp = tuple[tuple[int, int, int], tuple[int, int, int]]  # three numbers of a date in the order of the text; h, m, s

_FIRST_DAY = day_of(1970, 1, 1).toordinal()
_IS_PM = re.compile(rf"[Pp]\.?[\s\u202f\u00a0]?[Mm]|{_PM}")


def stamp(groups: tuple[str | None, ...]) -> Stamp | None:
    """The numbers of a match of STAMP; None if no clock shows that time."""
    a, b, c, before, hour, minute, second, after = groups
    clock = clock_time(before or after, hour, minute, second)
    return None if clock is None else ((int(a or 0), int(b or 0), int(c or 0)), clock)


def clock_time(noon: str | None, hour: str | None, minute: str | None, second: str | None) -> tuple[int, int, int] | None:
    """(hour of 24, minute, second) of the groups of TIME."""
    h, m, s = int(hour or 0), int(minute or 0), int(second or 0)
    if noon and h <= 12:
        h = h % 12 + (12 if _IS_PM.match(noon) else 0)
    return (h, m, s) if h < 24 and m < 60 and s < 60 else None


def moment(date: tuple[int, int, int], clock: tuple[int, int, int], order: str = "ymd") -> float | None:
    """Seconds since 1970; order: which of the date's numbers is year, month and day. None if there is no such day."""
    year, month, day = date[order.index("y")], date[order.index("m")], date[order.index("d")]
    hour, minute, second = clock
    if hour > 23 or minute > 59 or second > 59:
        return None
    try:
        days = day_of(year + (2000 if year < 100 else 0), month, day).toordinal() - _FIRST_DAY
    except ValueError:
        return None
    return float(((days * 24 + hour) * 60 + minute) * 60 + second)


_ANY = re.compile(rf"^[{MARKS}\s]*{STAMP}\s*$|^[{MARKS}\s]*\d{{10,13}}$")


def seconds_of(value: object) -> float | None:
    """A table's or JSON's time: seconds, milliseconds or microseconds since 1970, ISO 8601, or a date as printed; else None."""
    if isinstance(value, bool) or value is None:
        return None
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        pass
    else:
        while abs(number) > 1e11:  # later than the year 5138: a smaller unit
            number /= 1000
            if number == float("inf"):
                return None
        return number if number == number else None
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        pass
    match = _ANY.match(text[:LONGEST_HEADER])
    parsed = stamp(match.groups()) if match and match[1] else None
    if parsed is None:
        return None
    a, b, _ = parsed[0]
    return moment(*parsed, order="ymd" if a > 31 else "mdy" if b > 12 else "dmy")


# -- exports whose messages stand below a line with their date and speaker

_ACCOUNT = re.compile(r"^(.*?)\s*(?:\((\d{4,12})\)|[(<（]([^()<>（）\s]+@[^()<>（）\s]+)[)>）])$")
_DATE_FIRST = re.compile(rf"^[{MARKS}]*{STAMP}[\s:：]+(\S.{{0,60}})$")
_NAME_FIRST = re.compile(rf"^[{MARKS}]*(\S.{{0,60}}?)[\s:：]+{STAMP}$")


@dataclass(frozen=True, slots=True)
class Header:
    """Date and time, name and, where it is written, account of the speaker."""

    when: Stamp
    name: str
    account: str | None = None


def block_header(line: str) -> Header | None:
    """`2023-03-07 11:22:33 阿杰(10001)`, `2024-10-04 11:42:01 小红` or `小红 2023/09/16 下午2:51`."""
    line = line.rstrip()
    if len(line) > LONGEST_HEADER:
        return None
    first = _DATE_FIRST.match(line)
    groups, name = (first.groups()[:8], first[9]) if first else ((), "")
    if not first:
        last = _NAME_FIRST.match(line)
        if last is None:
            return None
        groups, name = last.groups()[1:], last[1]
    when = stamp(groups)
    if when is None or when[0][0] < 32 or not any(map(str.isalnum, name)) or block_header_in(name):
        return None
    account = _ACCOUNT.match(name)
    if account:
        return Header(when, account[1].strip() or account[2] or account[3], account[2] or account[3])
    return Header(when, name.strip().strip("'\"“”"))


def block_header_in(name: str) -> bool:
    """Is a supposed name itself a date or a time?"""
    return re.search(r"\d{1,2}:\d{2}|\d{4}[-/年]\d", name) is not None


@dataclass(frozen=True, slots=True)
class Block:
    """One message: number of its first line, its header and its text."""

    number: int
    header: Header
    text: str


def blocks(file: RawFile, encoding: str, ledger: Ledger) -> Iterator[Block]:
    """The messages of an export in which every header stands below a blank line; lines before the first are counted."""
    found: tuple[int, Header] | None = None
    lines = MessageLines()
    blank = True
    for number, line in file.text_lines(encoding, ledger):
        line = line.rstrip("\r\n")
        header = block_header(line) if blank else None
        if header is not None:
            if found is not None:
                yield Block(*found, "\n".join(lines).strip("\n"))
            found, lines = (number, header), MessageLines()
        elif found is not None:
            lines.add(line, f"{file.label}:{number}", ledger)
        elif line.strip():
            ledger.change("line before the first message left out", f"{file.label}:{number}: {line}")
        blank = not line.strip()
    if found is not None:
        yield Block(*found, "\n".join(lines).strip("\n"))


def block_headers(head: bytes) -> list[Header]:
    """Headers below blank lines at the beginning of a file."""
    lines = head.decode("utf-8", "ignore").removeprefix("\ufeff").splitlines()[:2000]
    above = ["", *lines]
    found = (block_header(line) for line, before in zip(lines, above, strict=False) if not before.strip())
    return [header for header in found if header is not None]


def names_repeat(headers: list[Header]) -> bool:
    """Do a few speakers write again and again?"""
    counts = Counter(header.name for header in headers)
    return len(headers) >= 2 and len(counts) <= max(2, len(headers) * 2 // 3)


_STAMPED = re.compile(rf"^[{MARKS}\s\[【(]*{STAMP}|^\S.{{0,60}}?[\s:：]+{STAMP}\s*$")
_TIMED = re.compile(rf"^\[?(?:{TIME})\]?\t[^\t\n]*\t|^\[[^\]\n]{{1,60}}\] ?\[{TIME}\]")


def looks_dated(head: bytes) -> bool:
    """Do the lines look like date and speaker, as in a chat? Such a text is never guessed to be a document."""
    lines = [line[:LONGEST_HEADER] for line in head.decode("utf-8", "ignore").splitlines()[:1000] if line.strip()]
    dated = sum(_STAMPED.match(line) is not None or _TIMED.match(line) is not None for line in lines)
    return dated >= 3 and dated * 20 >= len(lines)
