"""LINE's "send chat history": a day, `2023/05/01(月)`, then `21:15<TAB>小明<TAB>text`; texts of several lines in quotes.

The computer's export has dots in its day lines and blanks between time, name and text: `21:15 小明 text`. There a name of
several words is known by the title, "[LINE] 与小明的聊天记录", or by being how other lines begin.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ...cleaning.placeholders import placeholder
from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.limits import MessageLines
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations
from .dated import DATE, MARKS, TIME, clock_time, moment

_WEEKDAY = (
    r"(?:[\s(（]*(?:星期|週|周|礼拜|禮拜)?[一二三四五六日天月火水木金土월화수목금토일]?(?:曜日|요일)?[)）]?"
    r"|[\s,(]*[A-Z][a-z]{1,8}\)?)"
)
_DAY = re.compile(rf"^[{MARKS}]*(?:[A-Z][a-z]{{2,8}}, )?{DATE}{_WEEKDAY}\s*$")
_SAID = re.compile(rf"^{TIME}(?:\t([^\t]*)\t(.*)| (\S.*))$", re.S)
_TITLE = re.compile(r"^\ufeff?\[LINE\]")
_TITLED = re.compile(
    r"(?:与|與|和)(.{1,40}?)的(?:聊天|對話|对话)|with (.{1,40})$|^(.{1,40}?)とのトーク|^(.{1,40}?)님과의? ?(?:대화|채팅)"
)
_NOTICE = re.compile(
    r"(?:が.{0,60}(?:参加|招待|退出|退会|変更|削除)しました|が.{0,60}取り消しました"
    r"|已?(?:加入|退出|離開)(?:群組|聊天|群聊)?|已?(?:收回|撤回)訊息"
    r"|(?:joined|left|invited|unsent|changed|removed) .{0,60})[。.]?$"
)
_LINES_TRIED = 400


def recognise(head: bytes, name: str) -> bool:
    """A title of LINE, or a day line followed by times; tabs, or the title, tell it from other logs."""
    lines = head.decode("utf-8-sig", "ignore").splitlines()[:_LINES_TRIED]
    days = [n for n, line in enumerate(lines) if _DAY.match(line)]
    said = [found for line in lines if (found := _SAID.match(line))]
    if not days or not said:
        return False
    titled = _TITLE.match(lines[0]) is not None
    return titled or (len(said) >= 2 and (all(found[6] is not None for found in said) or days[0] <= 3))


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one chat, cut at silences."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message with text, as sent."""
    names = _names(file, options.encoding)
    day: tuple[int, int, int] | None = None
    found: tuple[int, float | None, str, MessageLines] | None = None
    for number, line in file.text_lines(options.encoding, ledger):
        line = line.rstrip("\r\n")
        dated, said = _DAY.match(line), _SAID.match(line)
        clock = clock_time(said[1] or said[5], said[2], said[3], said[4]) if said else None
        if day is not None and said and clock is not None:
            if found is not None:
                yield from _message(*found, file, ledger)
            sender, body = (said[6], said[7]) if said[6] is not None else _split(said[8], names)
            found = (number, moment(day, clock), sender, MessageLines([body]))
        elif dated:
            if found is not None:
                yield from _message(*found, file, ledger)
            day, found = _date(dated), None
        elif found is not None:
            found[3].add(line, f"{file.label}:{number}", ledger)
        elif line.strip():
            ledger.change("line before the first message left out", f"{file.label}:{number}: {line}")
    if found is not None:
        yield from _message(*found, file, ledger)


def _message(
    number: int, time: float | None, sender: str, lines: list[str], file: RawFile, ledger: Ledger
) -> Iterator[ChatMessage]:
    body = "\n".join(lines).strip("\n")
    where = f"{file.label}:{number}: {sender} {body}"
    if len(lines) > 1 and body.startswith('"') and body.endswith('"'):
        body = body[1:-1].replace('""', '"')
    if not sender.strip() or (not body and _NOTICE.search(sender)) or _NOTICE.fullmatch(body):
        ledger.change("service line left out", where)
    elif placeholder(body):
        ledger.change("media left out", where)
    else:
        yield ChatMessage(sender.strip(), body, time, key=str(number))


def _date(found: re.Match[str]) -> tuple[int, int, int]:
    """(year, month, day); English exports print month/day/year."""
    a, b, c = (int(part) for part in found.groups()[:3])
    if a > 31:
        return a, b, c
    return (c, a, b) if b > 12 or a <= 12 else (c, b, a)


def _names(file: RawFile, encoding: str) -> list[str]:
    """Names of several words, the longest first: that of the title, and beginnings of many lines."""
    counts: Counter[str] = Counter()
    names: set[str] = set()
    for number, line in file.text_lines(encoding, Ledger()):
        said = _SAID.match(line.rstrip("\r\n"))
        if number == 1 and _TITLE.match(line):
            titled = _TITLED.search(line.strip().removeprefix("\ufeff").removeprefix("[LINE]").strip().removesuffix(".txt"))
            names |= {name.strip() for name in (titled.groups() if titled else ()) if name}
        elif said and said[8]:
            words = said[8].split(" ")
            counts[words[0]] += 1
            if len(words) > 2:
                counts[" ".join(words[:2])] += 1
    # "Ann Lee" is a name if nearly every line that begins with Ann goes on with Lee.
    for pair, count in counts.items():
        if " " in pair and count >= 3 and count * 10 >= counts[pair.split(" ")[0]] * 9:
            names.add(pair)
    return sorted(names, key=lambda name: (-len(name), name))


def _split(rest: str, names: list[str]) -> tuple[str, str]:
    """(name, text) of `小明 text`."""
    for name in names:
        if rest.startswith(name + " "):
            return name, rest[len(name) + 1 :]
    name, _, text = rest.partition(" ")
    return name, text
