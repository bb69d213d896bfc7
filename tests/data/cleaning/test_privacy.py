"""Planted personal data is found; what only looks like it is left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatmill.data.bench.privacy import PLANTS, Score, measure, table, texts
from chatmill.data.cleaning.clean import Cleaner
from chatmill.data.cleaning.privacy import PrivateSpan, find
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import CleanSection, PrivacySection

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    return measure()


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_data_is_found_with_its_exact_borders(kind: str, scores: dict[str, Score]) -> None:
    missed = [
        text for text, planted, a, b in texts(60, seed=1) if planted == kind and PrivateSpan(kind, a, b) not in find(text)
    ]
    assert scores[kind].planted == 1000 and scores[kind].recall >= 0.95, missed[:5]
    assert len(missed) <= 3, missed


def test_what_only_looks_private_is_left_alone(scores: dict[str, Score]) -> None:
    wrong = [(text, find(text)) for text, kind, _, _ in texts(200, seed=2) if kind is None and find(text)]
    assert all(score.precision >= 0.98 for score in scores.values()) and len(wrong) <= 8, wrong[:8]


def test_the_documented_precision_and_recall_are_the_measured_ones(scores: dict[str, Score]) -> None:
    assert table(scores) in DOCS.read_text(encoding="utf-8"), f"docs/data.md should say:\n{table(scores)}"


def test_numbers_without_any_shape_are_found_after_a_word_for_telephone() -> None:
    for text in ("call me: 015112345678", "我的手机13812345678", "mein Telefon ist 030 123456", "мой телефон 89161234567"):
        assert [f.kind for f in find(text)] == ["phone"]
    assert find("order 015112345678 came, 13812345678 times") == []


@pytest.mark.parametrize("phone", ["06 12 34 56 78", "(030) 1234567", "0151 23456789", "+55 (11) 91234-5678"])
def test_phones_of_several_countries_are_found_whole_and_without_the_brackets_around_them(phone: str) -> None:
    text = f"my number ({phone}) is new"
    assert [text[f.start : f.end] for f in find(text)] == [phone]


def test_fenced_code_is_searched_or_left_alone_as_asked() -> None:
    said = talk("hi", "key:\n```\nghp_" + "a1" * 18 + "\n```\nmail a@b.com")
    for code, expected in ((True, 2), (False, 1)):
        ledger = Ledger()
        kept = Cleaner(CleanSection(privacy=PrivacySection(mode="redact", code=code))).apply(said, ledger)
        assert kept is not None and ("ghp_" in kept.turns[1].content) is not code and "[EMAIL]" in kept.turns[1].content
        assert sum(n for reason, n in ledger.changed.items() if reason.startswith("private")) == expected


def talk(*contents: str) -> Conversation:
    return Conversation("u", tuple(Turn("assistant" if i % 2 else "user", c) for i, c in enumerate(contents)), "s", "o")


def test_surrogates_are_the_same_within_a_dialogue_and_redaction_names_the_kind() -> None:
    said = talk(
        "mail me: Ann.Lee@corp.com, or bob@corp.com",
        "ann.lee@corp.com it is; call (415) 555-2671",
        "415-555-2671?\n```\nkey = 'sk-" + "a1" * 20 + "'\n```",
    )
    ledger = Ledger()
    kept = Cleaner(CleanSection(privacy=PrivacySection(mode="surrogate"))).apply(said, ledger)
    assert kept is not None
    texts = [turn.content for turn in kept.turns]
    assert texts[0] == "mail me: person1@example.org, or person2@example.org"
    assert texts[1] == "person1@example.org it is; call +1-202-555-0101"
    assert texts[2] == "+1-202-555-0101?\n```\nkey = '[KEY 1]'\n```"
    assert {reason: n for reason, n in ledger.changed.items() if reason.startswith("private")} == {
        "private: email": 3, "private: phone": 2, "private: key": 1,
    }  # fmt: skip
    assert "corp.com" not in str(ledger.examples)
    redacted = Cleaner(CleanSection(privacy=PrivacySection(mode="redact", kinds=("email",)))).apply(said, Ledger())
    assert redacted is not None and redacted.turns[0].content == "mail me: [EMAIL], or [EMAIL]"
    assert "2671" in redacted.turns[1].content
    untouched = Cleaner(CleanSection()).apply(said, Ledger())
    assert untouched is not None and re.search("Ann.Lee@corp.com", untouched.turns[0].content)


def test_stand_ins_are_not_found_again_as_other_kinds() -> None:
    for text in ("person1@example.org", "+1-202-555-0101", "192.0.2.2", "[CARD 1]", "[IBAN 2]", "[KEY 3]"):
        assert len(find(text)) <= 1
