"""Planted personal data is found; what only looks like it is left alone."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from chatmill.data.bench.privacy import CHINESE_PLANTS, PLANTS, Score, full_width, measure, table, texts
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


@pytest.fixture(scope="module")
def chinese_scores() -> dict[str, Score]:
    return measure(chinese=True)


def test_what_only_looks_private_is_left_alone(scores: dict[str, Score]) -> None:
    wrong = [(text, find(text)) for text, kind, _, _ in texts(200, seed=2) if kind is None and find(text)]
    assert all(score.precision >= 0.98 for score in scores.values()) and len(wrong) <= 8, wrong[:8]


@pytest.mark.parametrize("kind", CHINESE_PLANTS)
def test_chinese_data_is_found_with_its_exact_borders(kind: str, chinese_scores: dict[str, Score]) -> None:
    score = chinese_scores[kind]
    missed = [
        (text, find(text))
        for text, planted, a, b in texts(60, seed=1, chinese=True)
        if planted == kind and PrivateSpan(kind, a, b) not in find(text)
    ]
    assert score.planted == 1000 and score.recall >= 0.98 and score.precision >= 0.98, missed[:5]
    assert len(missed) <= 1, missed


def test_the_documented_precision_and_recall_are_the_measured_ones(
    scores: dict[str, Score], chinese_scores: dict[str, Score]
) -> None:
    for measured in (scores, chinese_scores):
        assert table(measured) in DOCS.read_text(encoding="utf-8"), f"docs/data.md should say:\n{table(measured)}"


PHRASES = (
    "打我{}", "有事找我 {}", "{}，加微信同号", "联系方式：{}", "收件人张三，{}，朝阳区", "我的号{}", "王师傅{}", "VX：{}",
    "手机{}", "电话：{}", "我的手机号是{}", "打电话给我{}", "{}", "tel{}，谢谢", "号码（{}）",
)  # fmt: skip


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_mainland_mobile_is_found_in_every_phrasing_and_form(phrase: str) -> None:
    for number in (
        "13812345678",
        "138 1234 5678",
        "138-1234-5678",
        "+86 13812345678",
        "１９１２３４５６７８９",
        "154 123 45678",
    ):
        text = phrase.format(number)
        assert [(f.kind, text[f.start : f.end]) for f in find(text)] == [("phone", number)]


@pytest.mark.parametrize("kind", [kind for kind in PLANTS if kind != "credentials"])
def test_full_width_forms_are_found_by_every_detector(kind: str) -> None:
    for text, planted, a, b in texts(40, seed=3):
        if planted == kind and (kind, a, b) in [(f.kind, f.start, f.end) for f in find(text)] and text[a:b].isascii():
            wide = f"{text[:a]}{full_width(text[a:b])}{text[b:]}"
            assert PrivateSpan(kind, a, b) in find(wide), wide


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("身份证110101199003071233", "id", "110101199003071233"),  # its checksum holds
        ("身份证号：11010119900307123X", "id", "11010119900307123X"),  # it does not, but the word says what it is
        ("身份证号码是110101900307123", "id", "110101900307123"),  # of 15 digits, as issued until 1999
        ("护照号E12345678", "id", "E12345678"),
        ("我的身分證是A123456789", "id", "A123456789"),
        ("HKID A123456(3)", "id", "A123456(3)"),
        ("卡号6228480012345678123", "card", "6228480012345678123"),
        ("QQ：1234567890", "account", "1234567890"),
        ("我的微信是xiao_ming88", "account", "xiao_ming88"),
        ("车牌京A12345", "plate", "京A12345"),
        ("幺三八一二三四五六七八", "phone", "幺三八一二三四五六七八"),
        ("寄到天津市和平区南京路8号3号楼502室吧", "address", "天津市和平区南京路8号3号楼502室"),
    ],
)
def test_chinese_kinds(text: str, kind: str, found: str) -> None:
    assert [(f.kind, text[f.start : f.end]) for f in find(text)] == [(kind, found)]


@pytest.mark.parametrize(
    "text",
    [
        "订单号：13812345678", "花了13812345678元", "order 13812345678 came", "编号110101199003071234", "时间戳1600000000000",
        "用微信聊天wechat好用", "这条街3号店好吃",
        "三一四一五九二六五三五八九", "A123456(4)", "在微信付了128元", "QQ音乐2024", "下一站路3号线",
    ],
)  # fmt: skip
def test_chinese_numbers_that_are_nobodys_are_left_alone(text: str) -> None:
    assert find(text) == []


def test_the_search_takes_time_in_proportion_to_the_text() -> None:
    for unit in ("市", "北京市朝阳区", "路1号", "微信 ", "中山路1号啊", "138 1234 "):
        text = unit * (60_000 // len(unit)) + "1"
        started = time.process_time()
        find(text)
        assert time.process_time() - started < 5, unit


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
