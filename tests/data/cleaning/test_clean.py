"""Each cleaning rule does its one thing, counts it, and leaves code alone."""

from __future__ import annotations

from typing import Any

import pytest

from chatmill.config import ConfigError
from chatmill.data.cleaning.clean import Cleaner
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import CleanSection, PairSection, PrivacySection
from chatmill.data.samples.pair import make_samples


def talk(*contents: str, roles: str = "") -> Conversation:
    names = {"s": "system", "u": "user", "a": "assistant"}
    order = roles or "ua" * len(contents)
    turns = tuple(Turn(names[order[i]], text) for i, text in enumerate(contents))  # type: ignore[arg-type]
    return Conversation("u", turns, "s", "raw:1", {})


def clean(conversation: Conversation, **config: Any) -> tuple[list[str] | None, Ledger]:
    ledger = Ledger()
    kept = Cleaner(CleanSection(**({"min_dialogue_chars": 0} | config))).apply(conversation, ledger)
    return None if kept is None else [turn.content for turn in kept.turns], ledger


CODE = "```python\nx = 'A\u030a'  \n\n\n\n\ny\u200b = 1 <p>not</p> <b>html</b> https://x.org/\n```"


def test_code_fences_are_untouched_while_the_text_around_them_is_cleaned() -> None:
    kept, ledger = clean(talk("hi", f"A\u030a  \n{CODE}\nsee https://x.org/a. <p>so</p><p>on</p>"), html=True, urls="replace")
    assert kept is not None
    assert CODE in kept[1]
    assert kept[1].startswith("Å\n") and kept[1].endswith("see [URL].\n\nso\n\non")
    assert ledger.changed["text: URL"] == 1 and ledger.changed["text: HTML"] == 1


def test_joiners_of_emoji_persian_and_indic_words_survive() -> None:
    text = "👩‍👩‍👧 می‌خواهم क्‍ष"
    kept, ledger = clean(talk(text, text))
    assert kept == [text, text] and not ledger.changed


def test_invisible_and_control_characters_go() -> None:
    kept, _ = clean(talk("a\u200bb\ufeffc\u202ed\x07\x1be\u00ad", "one\r\ntwo\rthree\u2028four\tfive"))
    assert kept == ["abcde", "one\ntwo\nthree\nfour\tfive"]


def test_indentation_and_lists_survive_the_whitespace_rule() -> None:
    kept, _ = clean(talk("x", "list:  \n- a\n  - b\n\n\n\n\n\nend\u00a0here  "))
    assert kept == ["x", "list:\n- a\n  - b\n\n\nend here"]


def test_deleted_and_empty_turns_go_and_are_counted() -> None:
    kept, ledger = clean(talk("hello", "[deleted]", "there", "   ", "<Media omitted>", "fine [deleted] word"))
    assert kept == ["hello", "there", "fine [deleted] word"]
    assert ledger.changed == {"turn: deleted or left out by the exporter": 2, "turn: empty": 1, "text: whitespace": 1}
    assert ledger.examples["turn: deleted or left out by the exporter"] == ["raw:1: [deleted]", "raw:1: <Media omitted>"]


@pytest.mark.parametrize(
    ("conversation", "config", "reason"),
    [
        (talk("hi", "yo"), {"min_dialogue_chars": 16}, "shorter than 16 characters"),
        (talk("x" * 50, "y"), {"max_dialogue_chars": 40}, "longer than 40 characters"),
        (talk("x" * 50, "y"), {"max_turn_chars": 40}, "a turn longer than 40 characters"),
        (talk("q", "same\n" * 12), {}, "repeated lines"),
        (talk("q", "so " + "a" * 90), {}, "one character over and over"),
        (talk("q", "As an AI language model, I cannot"), {"drop_provider_identity": True}, "provider identity"),
        (talk("q", "I was trained by OpenAI."), {"drop_provider_identity": True}, "provider identity"),
        (talk("q", "I'm sorry, but I can't help with that."), {"drop_refusals": True}, "refusal"),
        (talk("buy now", "ok"), {"drop_patterns": ["(?i)BUY NOW"]}, "pattern (?i)BUY NOW"),
        (talk("[deleted]", ""), {}, "nothing left"),
    ],
)
def test_a_dialogue_rule_drops_and_says_why(conversation: Conversation, config: dict[str, Any], reason: str) -> None:
    kept, ledger = clean(conversation, **config)
    assert kept is None and ledger.dropped == {reason: 1} and ledger.examples[reason][0].startswith("raw:1")


@pytest.mark.parametrize(
    "conversation",
    [
        talk("same" + "\nsame" * 12, "what the user repeats is not learned"),
        talk("q", "```\n" + "=" * 90 + "\n```"),
        talk("are you an AI?", "I am sorry to hear that; tell me more about OpenAI."),
        talk("q", "haha" * 3 + "!" * 20),
        talk("q", "```\n" + "row\n" * 60 + "```"),
        talk("q", "ha ha ha ha ha"),
        talk("who made Android?", "Android is made by Google, I think. Sorry, I can't come on Friday."),
        talk("are you a bot?", "I am a robot maker. Copy code from there?\nTen 1 / 2 of it"),
        talk("why", "The network error came back; you have reached me too late."),
    ],
)
def test_rules_spare_what_only_resembles(conversation: Conversation) -> None:
    judges = {"drop_refusals": True, "drop_provider_identity": True, "drop_bots": True, "drop_provider_errors": True}
    kept, _ = clean(conversation, **judges, boilerplate=True, repetition={})
    assert kept == [turn.content for turn in conversation.turns]


def test_boilerplate_lines_go_and_bad_patterns_are_named() -> None:
    kept, _ = clean(talk("q", "Copy code\nfine\n  Copy code  \nCopy code please"), strip_lines=["Copy code"])
    assert kept == ["q", "fine\nCopy code please"]
    with pytest.raises(ConfigError, match=r"clean\.strip_lines"):
        clean(talk("q"), strip_lines=["("])


def test_cleaning_twice_changes_nothing_more() -> None:
    conversation = talk("a\u200b <p>x</p><p>y</p>  ", f"B\u030a\n\n\n\n\n{CODE}", "[removed]", "c")
    once, _ = clean(conversation, html=True)
    assert once is not None
    twice, ledger = clean(talk(*once), html=True)
    assert twice == once and not ledger.changed


def samples(conversation: Conversation, **config: Any) -> list[str]:
    ledger = Ledger()
    found = list(make_samples(conversation, PairSection(**config), ledger))
    assert ledger.kept == len(found)
    return [" ".join(f"{t.role[0]}{'' if t.loss else '-'}:{t.content}" for t in c.turns) for c in found]


def test_samples_start_with_the_user_end_with_the_assistant_and_alternate() -> None:
    assert samples(talk("x", "a", "b", "c", "d", "e", roles="auuaau")) == ["u:a\nb a:c\nd"]
    assert samples(talk("be kind", "q", "r", roles="sua")) == ["s:be kind u:q a:r"]
    assert samples(talk("q", "late", "r", roles="usa")) == ["u:q a:r"]
    assert samples(talk("a", "b", roles="au")) == []
    assert samples(talk("a", "b", "c", "d"), max_turns=3) == ["u:a a:b"]
    assert samples(talk("a", "b", "c", "d"), min_replies=3) == []


def test_pairs_learn_each_reply_once() -> None:
    found = samples(talk("p", "a", "b", "c", "d", "e", "f", roles="suauaua"), mode="pairs", context_turns=3)
    assert found == ["s:p u:a a:b", "s:p u:a a-:b u:c a:d", "s:p u:c a-:d u:e a:f"]


def test_all_pairs_of_a_conversation_share_its_thread() -> None:
    ledger = Ledger()
    found = list(make_samples(talk("a", "b", "c", "d"), PairSection(mode="pairs"), ledger))
    assert len({c.uid for c in found}) == 2 and {c.meta["thread"] for c in found} == {"u"}


def test_thoughts_beside_replies_are_cleaned_and_made_private_like_words() -> None:
    turns = (
        Turn("user", "mail me"),
        Turn("assistant", "I will write to ann@example.org.", reasoning="The address is ann@example.org.\u200b  \n"),
    )
    cleaned = Cleaner(CleanSection(privacy=PrivacySection(mode="redact"))).apply(Conversation("u", turns, "s", "o"), Ledger())
    assert cleaned is not None and cleaned.turns[1].content == "I will write to [EMAIL]."
    assert cleaned.turns[1].reasoning == "The address is [EMAIL]."


def test_calls_of_tools_survive_cleaning_or_become_words() -> None:
    line = '{"name": "f", "arguments": {"to": "ann@example.org"}}'
    conversation = Conversation("u", (Turn("user", "please do it"), Turn("assistant", f"Yes.\n{line}", calls=1)), "s", "o")
    kept = Cleaner(CleanSection(privacy=PrivacySection(mode="redact"))).apply(conversation, Ledger())
    assert kept is not None and kept.turns[1].said == "Yes."
    assert kept.turns[1].tool_calls == [{"name": "f", "arguments": {"to": "[EMAIL]"}}]
    broken = Cleaner(CleanSection(strip_lines=[r"\{.*"])).apply(conversation, Ledger())
    assert broken is not None and broken.turns[1].content == "Yes." and broken.turns[1].calls == 0


@pytest.mark.parametrize("text", ["<省略影音内容>", "[图片]", "撤回了一条消息", "Tämä viesti poistettiin"])
def test_what_clients_write_in_place_of_a_message_is_dropped_from_any_source(text: str) -> None:
    turns = (Turn("user", "how was the film yesterday?"), Turn("assistant", text), Turn("assistant", "I liked it."))
    ledger = Ledger()
    cleaned = Cleaner(CleanSection()).apply(Conversation("u", turns, "s", "o"), ledger)
    assert cleaned is not None and [t.content for t in cleaned.turns] == [turns[0].content, "I liked it."]
    assert ledger.changed["turn: deleted or left out by the exporter"] == 1
