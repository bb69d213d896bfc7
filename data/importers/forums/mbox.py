"""mbox mailboxes: mails become messages, In-Reply-To and References their threads.

Quoted lines, "On … wrote:", "原始邮件" and signatures are removed (quotes.py); HTML-only mails become text. The texts of a
mailbox are kept in a table on disk (spill.py), because an answer may come anywhere in it; memory holds one mail, or the texts
of one thread.
"""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterator
from email.message import EmailMessage
from email.utils import parseaddr
from itertools import groupby
from typing import Any, cast

from ...cleaning.html_text import html_to_text
from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.limits import WHOLE_BYTES, Lines, bounded_lines
from ...raw.spill import Spill, key, packed, unpacked
from ...recipe import SourceSection
from ..messages import ChatMessage, to_conversation
from ..records import MALFORMED
from .quotes import own_words

_FROM = re.compile(rb"^From \S+.* \d\d:\d\d(:\d\d)? ")
HEADER_CHARS = 1000
_IDS = re.compile(r"<[^<>\s]+>")


def recognise(head: bytes, name: str) -> bool:
    """A From line, then headers."""
    return _FROM.match(head) is not None or (name.lower().endswith(".mbox") and head.startswith(b"From "))


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One conversation per thread, mails in order of time; threads in order of their first mail."""
    with Spill(*_TABLES) as db:
        for number, raw in enumerate(_mails(file), 1):
            if raw is None:
                ledger.change(f"mail of more than {WHOLE_BYTES >> 20} MB left out", f"{file.label}:{number}")
                continue
            try:
                name, parents, sender, subject, time, text = _mail(raw, number)
            except (*MALFORMED, AssertionError) as error:  # the library's parser gives up on some headers
                ledger.change("mail that cannot be read left out", f"{file.label}:{number}: {type(error).__name__}: {error}")
                continue
            if not text:
                ledger.change("mail without text left out", f"{file.label}:{name}")
                continue
            known = (db.one("SELECT thread FROM ids WHERE id = ?", (key(parent),)) for parent in reversed(parents))
            thread = next((found[0] for found in known if found), key(parents[0] if parents else name))
            for one in (name, *parents):
                db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (key(one), thread))
            db.execute("INSERT OR IGNORE INTO threads VALUES (?, ?, ?)", (thread, number, packed(subject)))
            stored = packed(sender, text, time, name)
            db.execute("INSERT INTO mails VALUES (?, ?, ?)", (thread, time or 0.0, stored))
        for _, rows in groupby(db.execute(_IN_ORDER), key=lambda row: row[0]):
            mails, subject = list[ChatMessage](), ""
            for _, packed_subject, entry in rows:
                subject = unpacked(packed_subject)[0]
                mails.append(ChatMessage(*unpacked(entry)))
            origin, meta = f"{file.label}:{mails[0].key}", {"subject": subject}
            found = to_conversation(
                mails, source=source, origin=origin, ledger=ledger, assistant=options.assistant, meta=meta, people=True
            )
            if found is not None:
                yield found


class _ShortHeaders(email.policy.EmailPolicy):
    """Headers are read up to HEADER_CHARS: the parser of the standard library takes quadratic time for some."""

    def header_fetch_parse(self, name: str, value: str) -> Any:
        return super().header_fetch_parse(name, value if len(value) <= HEADER_CHARS else value[:HEADER_CHARS])


_POLICY = _ShortHeaders()


def _mail(raw: bytes, number: int) -> tuple[str, list[str], str, str, float | None, str]:
    """(id, ids of those it answers, sender, subject, seconds since 1970, own words) of one mail."""
    mail = email.message_from_bytes(raw, policy=_POLICY)
    assert isinstance(mail, EmailMessage)
    written = {key.lower(): str(value) for key, value in reversed(list(mail.raw_items()))}  # the first of a name counts
    name = (_IDS.findall(written.get("message-id", "")) or [f"{number}"])[0]
    parents = _IDS.findall(f"{written.get('references', '')} {written.get('in-reply-to', '')}")
    person, address = parseaddr(str(mail.get("From", "")))
    moment = getattr(mail.get("Date"), "datetime", None)
    time = moment.timestamp() if moment else None
    return name, parents, (address or person).lower(), str(mail.get("Subject", "")), time, own_words(_body(mail))


_TABLES = (
    "CREATE TABLE mails (thread, time REAL, entry)",
    "CREATE TABLE ids (id PRIMARY KEY, thread) WITHOUT ROWID",
    "CREATE TABLE threads (thread PRIMARY KEY, first INTEGER, subject) WITHOUT ROWID",
)
_IN_ORDER = """
    SELECT threads.first, threads.subject, mails.entry FROM mails JOIN threads ON threads.thread = mails.thread
    ORDER BY threads.first, mails.time, mails.rowid"""


def _body(mail: EmailMessage) -> str:
    part = mail.get_body(preferencelist=("plain", "html"))
    if part is None:
        return ""
    try:
        content = part.get_content()
    except (LookupError, ValueError, KeyError):  # unknown charset or encoding
        payload = part.get_payload(decode=True)
        content = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else str(payload)
    text = content if isinstance(content, str) else ""
    if part.get_content_type() == "text/html":
        return html_to_text(text)
    return re.sub(r"^>(>*From )", r"\1", text, flags=re.M)


def _mails(file: RawFile) -> Iterator[bytes | None]:
    """The mails; None in place of one of more than WHOLE_BYTES."""
    lines: list[bytes] = []
    size, blank = 0, True
    with file.open() as raw:
        for _, line in bounded_lines(cast(Lines[bytes], raw)):
            if line is not None and blank and line.startswith(b"From "):
                if size:
                    yield b"".join(lines) if size <= WHOLE_BYTES else None
                lines, size = [], 0
            else:
                size += WHOLE_BYTES + 1 if line is None else len(line)
                if line is not None and size <= WHOLE_BYTES:
                    lines.append(line)
            blank = line is not None and not line.strip()
    if size:
        yield b"".join(lines) if size <= WHOLE_BYTES else None
