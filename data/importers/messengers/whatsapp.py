"""WhatsApp "export chat": Android `12/31/20, 9:15 PM - Ann: hi`, iOS `[31.12.20, 21:15:02] Ann: hi`, in any language:
`2023/5/1 下午9:15 - 小明: …`, `2023년 5월 1일 오후 9:15 - 민수: …`.

A first pass over the whole file decides whether 3/4/20 is March or April: by a number above 12 somewhere, else by the order in
which time runs forward. Lines without a header continue the message above; headers without a name are service messages. iOS
puts U+200E before every text that the program wrote itself; Android's own texts are known by their wording in 50 languages.
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
from ..rebuild import conversations
from .dated import MARKS, STAMP, Stamp, moment, stamp

_HEADER = re.compile(rf"^[{MARKS}\s]*(?:\[{STAMP}\]\s?|{STAMP}\s+[-–—]\s)(.*)$", re.S)
_NAMED = re.compile(r"^([^:：\n]{1,100}?)(?::(?: (.*)|)|：(.*))$", re.S)
_NAMED_IOS = re.compile(r"^([^:：\n]{1,100}?)[:：] ?(.*)$", re.S)  # some languages print no blank
_SERVICE = (
    "end-to-end encrypted", "ende-zu-ende-verschlüsselt", "cifrado de extremo a extremo", "chiffrés de bout en bout",
    "crittografati end-to-end", "端到端加密", "端對端加密", "エンドツーエンド暗号化", "종단간 암호화", "сквозным шифрованием",
    "salataan täysin",
)  # fmt: skip
_EDITED = (
    "This message was edited|此消息已编辑|这条消息已编辑|此訊息已編輯|已編輯此訊息|Diese Nachricht wurde bearbeitet"
    "|Ce message a été modifié|Se editó este mensaje|Mensagem editada|Questo messaggio è stato modificato"
    "|Tätä viestiä on muokattu|Muokattu|편집된 메시지|このメッセージは編集されました|Сообщение изменено"
)
_TRAILING = re.compile(f"(?<!\\s)\\s*(?:\u200e<[^<>\n]+>|<(?:{_EDITED})>)\\s*$")
Header = tuple[Stamp, str, bool]  # when, the rest of the line, written by iOS?


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
    lines = MessageLines()
    for number, line in file.text_lines(options.encoding, ledger):
        line = line.rstrip("\r\n")
        header = _parse(line)
        if header is None:
            if pending is not None:
                lines.add(line, f"{file.label}:{number}", ledger)
            elif line.strip():
                ledger.change("line before the first message left out", f"{file.label}:{number}: {line}")
            continue
        if pending is not None:
            yield from _message(pending, lines, order, file, ledger)
        pending, lines = (number, header), MessageLines()
    if pending is not None:
        yield from _message(pending, lines, order, file, ledger)


def _message(found: tuple[int, Header], more: list[str], order: str, file: RawFile, ledger: Ledger) -> Iterator[ChatMessage]:
    number, ((date, clock), rest, ios) = found
    where = f"{file.label}:{number}: {rest}"
    named = (_NAMED_IOS if ios else _NAMED).match(rest)
    if named is None or any(map(rest.lower().__contains__, _SERVICE)):
        ledger.change("service line left out", where)
        return
    sender = named[1].strip(MARKS + " ~\u202f\u00a0")
    body = "\n".join([next((part for part in named.groups()[1:] if part), ""), *more]).strip("\n\r")
    if body.startswith("\u200e") or placeholder(body):  # what iOS wrote itself, or one of Android's texts
        ledger.change("media left out", where)
        return
    body = body.strip(MARKS + "\n\r")
    body = (_TRAILING.sub("", body) if body.rstrip().endswith(">") else body).rstrip(MARKS)
    yield ChatMessage(sender, body, moment(date, clock, order), key=str(number))


def _parse(line: str) -> Header | None:
    match = _HEADER.match(line)
    if match is None:
        return None
    groups = match.groups()
    ios = groups[0] is not None
    when = stamp(groups[:8] if ios else groups[8:16])
    return None if when is None else (when, groups[16], ios)


def _date_order(file: RawFile, encoding: str, ledger: Ledger) -> str:
    """`dmy`, `mdy` or `ymd`, from every header of the file."""
    largest, backwards = [0, 0], {"dmy": 0, "mdy": 0}
    last: dict[str, tuple[int, ...]] = {}
    for _, line in file.text_lines(encoding, Ledger()):
        header = _parse(line.rstrip("\r\n"))
        if header is None:
            continue
        (a, b, c), clock = header[0]
        largest = [max(largest[0], a), max(largest[1], b)]
        if largest[0] > 31:
            return "ymd"
        if max(largest) > 12:  # the order of time no longer matters
            continue
        for name, key in (("dmy", (c, b, a, *clock)), ("mdy", (c, a, b, *clock))):
            backwards[name] += last.get(name, key) > key
            last[name] = key
    if largest[0] > 12 or largest[1] > 12:
        return "dmy" if largest[0] > 12 else "mdy"
    if backwards["dmy"] != backwards["mdy"]:
        return min(backwards, key=lambda name: backwards[name])
    ledger.change("day/month order not certain: day first assumed", file.label)
    return "dmy"
