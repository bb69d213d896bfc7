"""Texts are hostile until read: what looks at them takes time in proportion to their length, whatever they repeat."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from chatmill.data.cleaning import privacy
from chatmill.data.cleaning.clean import Cleaner
from chatmill.data.cleaning.fences import split_fences
from chatmill.data.cleaning.html_text import html_to_text
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.importers.assistants import gemini
from chatmill.data.importers.datasets import pairs
from chatmill.data.importers.forums import mbox
from chatmill.data.importers.forums.quotes import own_words
from chatmill.data.importers.messengers import dated, whatsapp
from chatmill.data.importers.registry import importer, read_file, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import CleanSection, SourceSection
from chatmill.data.tokenizer import sandbox

LENGTH = 16_000  # what was quadratic took 3 s and more
SEEN, MOST = 0.2, 8.0  # seconds of processor time from which a ratio says something, and the most that a ratio may be
UNITS = (
    "<", "<a ", "<!--", "<!-- >", "<![CDATA[", '<a x="', "<blockquote>", "<ul><li>", "&", '"', "[", "(", "\n", " ", "\t",
    "\r\n", " \n", "a\n", "> ", "> > ", ":", "1.", "2023/05/01 ", "a@", "a@b.co ", "1.2.3.4 ", "😀", "e\u0301", "中 ", "- ",
    "```\n", "wrote:\n", "From: x\nTo: y\n", "http://a:b@",
)  # fmt: skip
EVERYTHING = CleanSection.model_validate(
    {"html": True, "urls": "replace", "privacy": {"mode": "redact"}, "drop_bots": True, "drop_refusals": True, "repetition": {},
     "drop_provider_identity": True, "drop_provider_errors": True, "boilerplate": True, "max_turn_chars": None,
     "max_dialogue_chars": None, "mojibake": False, "languages": []}
)  # fmt: skip
CLEANER = Cleaner(EVERYTHING)


def mail(text: str) -> bytes:
    value = text.replace("\n", "")
    headers = "".join(f"{name}: {value}\n" for name in ("From", "To", "References", "Subject", "Date", "Content-Type"))
    return f"{headers}\n{text}\n".encode()


WHAT: dict[str, Callable[[str], object]] = {
    "HTML": html_to_text,
    "quotes of mails": own_words,
    "headers of mails": lambda text: mbox._mail(mail(text), 1),
    "fences": split_fences,
    "private data": privacy.find,
    "all rules": lambda text: CLEANER.apply(Conversation("u", (Turn("assistant", text),), "s", "o"), Ledger()),
    "marks of importers": lambda text: [
        pattern.sub("", text) for pattern in (whatsapp._TRAILING, gemini._ATTACHED, pairs._MOSS)
    ],
    "headers of chats": lambda text: (dated.block_header(text), dated.seconds_of(text), dated.looks_dated(text.encode())),
    "layouts of templates": sandbox._WIDE_FORMAT.search,
}


def growth(function: Callable[[str], object], unit: str, end: str = "") -> float:
    """Processor time of a text over that of its quarter: 4 where it is linear, 16 where quadratic, 0 where it is too short."""

    def seconds(length: int) -> float:
        text = unit * (length // len(unit)) + end
        start = time.process_time()
        with suppress(RecursionError):  # the importer leaves such a mail out
            function(text)
        return time.process_time() - start

    whole = seconds(LENGTH)
    if whole < SEEN:
        return 0.0
    ratio = whole / seconds(LENGTH // 4)
    for _ in range(2):  # another look: the machine may have been busy
        if ratio > MOST:
            ratio = min(ratio, seconds(LENGTH) / seconds(LENGTH // 4))
    return ratio


@pytest.mark.parametrize("what", WHAT)
def test_time_is_linear_in_what_repeats(what: str) -> None:
    found = {unit + end: growth(WHAT[what], unit, end) for unit in UNITS for end in ("", "x>")}
    assert not {unit: ratio for unit, ratio in found.items() if ratio > MOST}


@pytest.mark.parametrize("kind", ["irc", "kakaotalk", "line", "qq", "signal", "transcript", "wechat", "whatsapp"])
def test_chats_are_read_in_linear_time(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    section = SourceSection(path=str(path), format=kind)

    def read(text: str) -> None:
        path.write_text(f"2023/05/01(月)\n[01.05.23, 21:15:00] Ann: hi\n----- {text}", encoding="utf-8")
        importer(kind).recognise(path.read_bytes(), path.name)
        for file in source_files(section):
            list(read_file(file, section, Ledger()))

    found = {unit: growth(read, unit) for unit in UNITS}
    assert not {unit: ratio for unit, ratio in found.items() if ratio > MOST}


def test_what_is_quadratic_is_seen() -> None:
    assert growth(lambda text: re.search(r"a*ab", text[: len(text) // 2]), "a") > MOST


def test_markup_without_ends_loses_no_words() -> None:
    assert html_to_text("a <b>bold</b> 1 < 2 and <!-- no end") == "a bold 1 < 2 and <!-- no end"
    assert html_to_text("a<!-- b --> c<![if !mso]>d<![endif]> <?php e ?>f") == "a cd f"
    assert html_to_text("<![foo[ x") == "<![foo[ x"
    assert html_to_text("<blockquote>" * 30 + "q" + "</blockquote>" * 30).endswith("q")


def test_overlapping_private_data_is_found_once_and_in_order() -> None:
    found = privacy.find("mail a@b.co, 10.1.2.3 and c@d.org http://me:secret@x.org/")
    assert [f.kind for f in found] == ["email", "ip", "email", "credentials"]
    assert all(one.end <= other.start for one, other in pairwise(found))
