"""mbox mailboxes: mails become messages, In-Reply-To and References their threads.

Quoted lines, "On … wrote:" and signatures are cut off; of HTML-only mails the text is taken. Memory holds the texts of one
mailbox, because an answer may stand anywhere in it.
"""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterator
from email.message import EmailMessage
from email.utils import parseaddr

from chatmill.data.conversation import Conversation
from chatmill.data.html_text import html_to_text
from chatmill.data.importers.messages import ChatMessage, to_conversation
from chatmill.data.importers.raw_file import RawFile
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

_FROM = re.compile(rb"^From \S+.* \d\d:\d\d(:\d\d)? ")
_WROTE = re.compile(
    r"\n*^(On\b.{4,200}\bwrote:|Am\b.{4,200}\bschrieb\b.{0,100}:|Le\b.{4,200}\ba écrit\s?:|-+ ?Original Message ?-+)\s*$",
    re.M | re.S,
)
_IDS = re.compile(r"<[^<>\s]+>")


def recognise(head: bytes, name: str) -> bool:
    """A From line, then headers."""
    return _FROM.match(head) is not None or (name.lower().endswith(".mbox") and head.startswith(b"From "))


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One conversation per thread, mails in order of time."""
    threads: dict[str, list[ChatMessage]] = {}
    thread_of: dict[str, str] = {}
    subjects: dict[str, str] = {}
    for number, raw in enumerate(_mails(file), 1):
        mail = email.message_from_bytes(raw, policy=email.policy.default)
        assert isinstance(mail, EmailMessage)
        key = (_IDS.findall(str(mail.get("Message-ID", ""))) or [f"{number}"])[0]
        parents = _IDS.findall(f"{mail.get('References', '')} {mail.get('In-Reply-To', '')}")
        text = own_words(_body(mail))
        name, address = parseaddr(str(mail.get("From", "")))
        if not text:
            ledger.change("mail without text left out", f"{file.label}:{key}")
            continue
        thread = next((thread_of[p] for p in reversed(parents) if p in thread_of), parents[0] if parents else key)
        for known in (key, *parents):
            thread_of.setdefault(known, thread)
        subjects.setdefault(thread, str(mail.get("Subject", "")))
        date = mail.get("Date")
        moment = getattr(date, "datetime", None)
        threads.setdefault(thread, []).append(
            ChatMessage((address or name).lower(), text, moment.timestamp() if moment else None, key)
        )
    for thread, mails in threads.items():
        mails.sort(key=lambda m: m.time or 0.0)
        origin = f"{file.label}:{mails[0].key}"
        meta = {"subject": subjects[thread]}
        found = to_conversation(mails, source=source, origin=origin, ledger=ledger, assistant=options.assistant, meta=meta)
        if found is not None:
            yield found


def own_words(text: str) -> str:
    """What the sender of a mail typed: no quotes, no attribution line, no signature."""
    text = text.replace("\r\n", "\n")
    wrote = _WROTE.search(text)
    if wrote and all(line.startswith(">") or not line.strip() for line in text[wrote.end() :].split("\n")[:3]):
        text = text[: wrote.start()] + "\n" + text[wrote.end() :]
    elif wrote and "Original Message" in wrote[1]:
        text = text[: wrote.start()]
    lines = [line for line in text.split("\n-- \n")[0].split("\n") if not line.startswith(">")]
    return "\n".join(lines).strip()


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


def _mails(file: RawFile) -> Iterator[bytes]:
    lines: list[bytes] = []
    blank = True
    with file.open() as raw:
        for line in raw:
            if blank and line.startswith(b"From "):
                if lines:
                    yield b"".join(lines)
                lines = []
            else:
                lines.append(line)
            blank = not line.strip()
    if lines:
        yield b"".join(lines)
