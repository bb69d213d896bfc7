"""KakaoTalk's "export chat" of phones, `2023. 5. 1. 오후 9:15, 민수 : 안녕`, and of computers, `[민수] [오후 9:15] 안녕`.

`2023년 5월 1일 오후 9:15, 민수 : 안녕` and `May 1, 2023, 9:15 PM, Min : hi` are other forms of the first; the second stands
below lines with the day. The Mac's CSV (Date,User,Message) is read here, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...cleaning.placeholders import placeholder
from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.limits import MessageLines
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..plain.rows import csv_rows, header_of
from ..rebuild import conversations
from .dated import DATE, LONGEST_HEADER, MARKS, STAMP, TIME, clock_time, moment, seconds_of, stamp

_MONTHS = "january february march april may june july august september october november december".split()  # noqa: SIM905
_ENGLISH = r"([A-Z][a-z]{2,8}) (\d{1,2}), (\d{4})"
_SAID = re.compile(rf"^[{MARKS}]*(?:{STAMP}|{_ENGLISH}(?: at|,)? {TIME}),\s(.{{1,60}}?)\s:\s?(.*)$", re.S)
_SYSTEM = re.compile(rf"^[{MARKS}]*(?:{STAMP}|{_ENGLISH}(?: at|,)? {TIME})(?:[,:]\s.*)?$")
_DAY = re.compile(rf"^-{{5,}} .*?(?:{DATE}|{_ENGLISH}).*? ?-{{5,}}$")
_PC = re.compile(rf"^\[([^\n]{{1,60}}?)\] \[{TIME}\] (.*)$", re.S)
_COLUMNS = ["Date", "User", "Message"]
_THINGS = ("사진", "동영상", "이모티콘", "음성메시지")  # alone in a message; elsewhere somebody may have written them


def recognise(head: bytes, name: str) -> bool:
    """Two messages of either kind among the first lines, or the columns of the CSV."""
    if name.lower().endswith(".csv"):
        return header_of(head) == _COLUMNS
    lines = [line[:LONGEST_HEADER] for line in head.decode("utf-8-sig", "ignore").splitlines()[:400]]
    computer = any(_DAY.match(line) for line in lines) and sum(_PC.match(line) is not None for line in lines) >= 2
    return computer or sum(_SAID.match(line) is not None for line in lines) >= 2


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one chat, cut at silences."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message with text, as sent."""
    for number, time, sender, text in _csv(file, options, ledger) if _is_csv(file) else _lines(file, options, ledger):
        where = f"{file.label}:{number}: {text}"
        if placeholder(text) or text.strip() in _THINGS:
            ledger.change("media left out", where)
        else:
            yield ChatMessage(sender, text, time, key=str(number))


def _is_csv(file: RawFile) -> bool:
    return file.stem.lower().endswith(".csv")


def _csv(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[tuple[int, float | None, str, str]]:
    for number, row in csv_rows(file, options.encoding, ledger)[1]:
        yield number, seconds_of(row.get("Date")), row.get("User") or "?", row.get("Message") or ""


def _lines(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[tuple[int, float | None, str, str]]:
    day: tuple[int, int, int] | None = None
    found: tuple[int, float | None, str, MessageLines] | None = None
    for number, line in file.text_lines(options.encoding, ledger):
        line = line.rstrip("\r\n")
        said, computer, dated = _SAID.match(line), _PC.match(line), _DAY.match(line[:LONGEST_HEADER])
        new: tuple[int, float | None, str, MessageLines] | None = None
        if said:
            when = _when(said.groups())
            new = (number, when, said[17].strip(), MessageLines([said[18]])) if when is not None else None
        elif computer and day is not None:
            clock = _clock(computer.groups()[1:6])
            new = (number, moment(day, clock), computer[1], MessageLines([computer[7]])) if clock else None
        service = new is None and (dated is not None or _SYSTEM.match(line[:LONGEST_HEADER]) is not None)
        if (new or service) and found is not None:
            yield found[0], found[1], found[2], "\n".join(found[3]).strip("\n")
            found = None
        if new is not None:
            found = new
        elif dated:
            day = _date(dated.groups())
        elif service:
            ledger.change("service line left out", f"{file.label}:{number}: {line}")
        elif found is not None:
            found[3].add(line, f"{file.label}:{number}", ledger)
        elif line.strip():
            ledger.change("line before the first message left out", f"{file.label}:{number}: {line}")
    if found is not None:
        yield found[0], found[1], found[2], "\n".join(found[3]).strip("\n")


def _clock(groups: tuple[str | None, ...]) -> tuple[int, int, int] | None:
    before, hour, minute, second, after = groups
    return clock_time(before or after, hour, minute, second)


def _when(groups: tuple[str | None, ...]) -> float | None:
    """Of the groups of _SAID."""
    if groups[0] is not None:
        parsed = stamp(groups[:8])
        if parsed is None:
            return None
        a, b, _ = parsed[0]
        return moment(*parsed, order="ymd" if a > 31 else "mdy" if b > 12 else "dmy")
    clock, date = _clock(groups[11:16]), _date((None, None, None, *groups[8:11]))
    return None if clock is None or date is None else moment(date, clock)


def _date(groups: tuple[str | None, ...]) -> tuple[int, int, int] | None:
    """(year, month, day) of the groups of DATE and _ENGLISH."""
    if groups[0] is not None:
        return int(groups[0]), int(groups[1] or 0), int(groups[2] or 0)
    month = next((n for n, name in enumerate(_MONTHS, 1) if name.startswith((groups[3] or "?").lower()[:3])), None)
    return None if month is None else (int(groups[5] or 0), month, int(groups[4] or 0))
