"""Rules look at a text only where a cheap test says that they may find something. Without the test they do the same."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable

import pytest

from chatmill.data.cleaning import placeholders, privacy
from chatmill.data.cleaning.clean import _CONTROL, normalise_newlines_and_controls, trim_whitespace
from chatmill.data.cleaning.phrases_chinese import plain
from chatmill.data.cleaning.repetition import character_runs
from chatmill.data.cleaning.scripts import has_letters, is_chinese, is_japanese, letter_weight
from chatmill.data.samples.dedup import canonical
from chatmill.data.samples.near_duplicates import _TOKEN, SHINGLE, shingles

ALL = "".join(map(chr, range(0x110000)))
PIECES = [
    "a",
    "Zé",
    " ",
    "\n",
    "\n\n\n\n\n",
    "\t ",
    "\u3000",
    "\xa0",
    "\r\n",
    "\x1c",
    "\u2029",
    "今天天气",
    "ですか",
    "ｶﾀ",
    "ＡＢ１",
    "١٢",
    "𝟙²½Ⅷ〇",
    "-",
    "aaaaa",
    "。。。。。。。",
    "她說無法",
    "9",
    "5500 0055 5555 5559",
    "x@y.de",
    "::1",
    "10.1.2.3",
    "1.2",
    "AKIA",
    "一三八零零",
    "sk-",
    "_live_",
    "AKIAABCDEFGHIJKLMNOP",
    "xoxb-1234567890",
    "hf_" + "a" * 32,
    "https://u:p@h",
    "138 1234 5678",
    "fi\u0301",
    "DE89370400440532013000",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Invented texts of these pieces."""
    rng = random.Random(1)
    return ["", *PIECES, *("".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(1500))]


def test_no_character_that_is_removed_is_printable() -> None:
    printable = "".join(filter(str.isprintable, ALL))
    assert len(printable) > 100_000 and normalise_newlines_and_controls(printable) is printable
    assert not _CONTROL.search(printable) and not set("\r\u2028\u2029") & set(printable)
    assert normalise_newlines_and_controls("a\u200bb\r\nc\u2028d") == "ab\nc\nd"


def test_blanks_at_line_ends_are_those_of_the_pattern(texts: list[str]) -> None:
    for text in (*texts, " ".join(ALL[:0x3100])):
        expected = re.sub(r"[^\S\n]+$", "", text.replace("\u00a0", " "), flags=re.M)
        assert trim_whitespace(text) == re.sub(r"\n{4,}", "\n\n\n", expected)


@pytest.mark.parametrize("most", [1, 2, 4, 6, 9, 60])
def test_runs_of_a_character_are_those_of_the_pattern(texts: list[str], most: int) -> None:
    slow, rng = re.compile(rf"(\S)\1{{{most},}}"), random.Random(2)
    longer = ["".join(c * rng.randint(1, most + 3) for c in rng.choices("ab 好", k=6)) for _ in range(300)]
    found = [character_runs(most)(text) for text in (*texts, *longer)]
    assert found == [slow.search(text) is not None for text in (*texts, *longer)] and len(set(found)) == 2


def test_letters_are_counted_as_one_by_one(texts: list[str]) -> None:
    for text in texts:
        letters = sum(c.isalpha() for c in text)
        han = len(re.findall("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]", text))
        assert is_chinese(text) == (2 * han > letters and not is_japanese(text))
        assert has_letters(text, 20) == (letter_weight(text) >= 20)
        assert len(plain(text)) == len(text)


def test_words_and_their_triples_are_those_of_the_definition(texts: list[str]) -> None:
    for text in texts:
        assert canonical(text) == re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
        words = _TOKEN.findall(canonical(text))
        assert shingles(text) == {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def test_no_private_data_is_missed_for_want_of_a_sign(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [privacy.find(text) for text in texts]
    always: dict[str, Callable[[str], bool]] = dict.fromkeys(privacy._SEARCHES, lambda text: True)
    monkeypatch.setattr(privacy, "_NEEDED", always)
    assert found == [privacy.find(text) for text in texts]
    assert {"key", "credentials", "email", "iban", "card", "ip", "phone"} <= {one.kind for spans in found for one in spans}


def test_no_placeholder_is_missed_for_want_of_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, words = random.Random(4), re.findall(r"[A-Za-z ]+|[^\w\s]", placeholders._known()[1].pattern)
    texts = ["".join(rng.choices([*words, "1", " ", ".", "a.jpg"], k=rng.randint(1, 6))) for _ in range(4000)]
    texts += [
        "Missed voice call",
        "Video call, no answer",
        "Ann unsent a message",
        "[Photo]",
        "IMG-1.jpg (file attached)",
        "<photo >",
    ]
    found = [placeholders.placeholder(text) for text in texts]
    monkeypatch.setattr(placeholders, "_ASCII_SIGNS", ("",))
    assert found == [placeholders.placeholder(text) for text in texts]
    assert {"media", "call", "deleted"} <= set(found)
