"""IRC logs: irssi and ZNC (`19:38 <nick> text`, `[19:38:15] <nick> text`), WeeChat (`2018-05-02 19:38:15<TAB>nick<TAB>text`).

`--- Day changed Wed May 02 2018`, `--- Log opened …` set irssi's day; a date in the file's name (2018-05-02) sets ZNC's.
A line that begins `nick: …` answers that nick's latest message. Joins, parts and server actions are left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations

_SAID = re.compile(r"^\[?(?:(\d{4}-\d\d-\d\d)[ T])?(\d\d?):(\d\d)(?::(\d\d))?\]?\s+<[@+%&~! ]?([^>\s]+)>\s(.*)$")
_WEECHAT = re.compile(r"^(\d{4}-\d\d-\d\d) (\d\d):(\d\d):(\d\d)\t[@+%&~!]?([^\t]*)\t(.*)$")
_DAY = re.compile(r"^--- (?:Day changed|Log opened) (?:\w{3}) (\w{3}) (\d\d?)(?: \d\d:\d\d:\d\d)? (\d{4})")
_NAME_DAY = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)")
_ADDRESSED = re.compile(r"^([A-Za-z\[\]\\`_^{|}][\w\[\]\\`^{|}-]*)[:,]\s")


def recognise(head: bytes, name: str) -> bool:
    """At least half of the first lines are messages of a person."""
    lines = [line for line in head.decode("utf-8", "ignore").splitlines()[:200] if line.strip()]
    said = sum(_SAID.match(line) is not None or _WEECHAT.match(line) is not None for line in lines)
    return said >= 2 and any(_SAID.match(line) or _WEECHAT.match(line) for line in lines) and said * 3 >= len(lines)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one channel's log."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every line that somebody wrote."""
    day = _day_of_name(file.stem)
    latest: dict[str, str] = {}
    last: datetime | None = None
    for number, line in file.text_lines(options.encoding, ledger):
        line = line.rstrip("\r\n")
        changed = _DAY.match(line)
        if changed:
            day, last = _day_of_marker(changed, day), None
            continue
        found = _SAID.match(line) or _WEECHAT.match(line)
        if found is None or found[5] in ("-->", "<--", "--", "*", "=!="):
            if line.strip():
                ledger.change("server line left out", f"{file.label}:{number}: {line}")
            continue
        date, hour, minute, second, nick, said = found.groups()
        try:
            base = datetime.fromisoformat(date).replace(tzinfo=UTC) if date else day
            moment = base.replace(hour=int(hour), minute=int(minute), second=int(second or 0))
            if date is None and last is not None and moment < last:  # past midnight without a marker
                day = day + timedelta(days=1)
                moment += timedelta(days=1)
        except (ValueError, OverflowError) as error:
            ledger.change("line with an impossible time left out", f"{file.label}:{number}: {line} ({error})")
            continue
        last = moment
        addressed = _ADDRESSED.match(said)
        target = addressed[1] if addressed and addressed[1] != nick else None
        yield ChatMessage(nick, said, moment.timestamp(), str(number), latest.get(target or ""))
        latest[nick] = str(number)


def _day_of_marker(found: re.Match[str], day: datetime) -> datetime:
    try:
        return datetime.strptime(" ".join(found.groups()), "%b %d %Y").replace(tzinfo=UTC)
    except ValueError:  # the 31st of February
        return day


def _day_of_name(name: str) -> datetime:
    found = _NAME_DAY.search(name)
    try:
        return (
            datetime.strptime("".join(found.groups()), "%Y%m%d").replace(tzinfo=UTC)
            if found
            else datetime(1970, 1, 1, tzinfo=UTC)
        )
    except ValueError:
        return datetime(1970, 1, 1, tzinfo=UTC)
