"""A turn that is dropped must not join its neighbours: the dialogue is cut there."""

from __future__ import annotations

from typing import Any

import pytest

from chatmill.data.cleaning.clean import CUTS, Cleaner
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.importers.messages import ChatMessage, to_conversation
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import CleanSection, PairSection
from chatmill.data.samples.pair import make_samples, parts

ROLES: dict[str, Any] = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


def talk(*said: str) -> Conversation:
    """Turns as `u: text`."""
    return Conversation("u", tuple(Turn(ROLES[line[0]], line[3:]) for line in said), "s", "o", {})


def samples(conversation: Conversation, clean: dict[str, Any] | None = None, **pair: Any) -> list[list[str]]:
    cleaned = Cleaner(CleanSection.model_validate({"min_dialogue_chars": 0} | (clean or {}))).apply(conversation, Ledger())
    assert cleaned is not None
    found = list(make_samples(cleaned, PairSection(**pair), Ledger()))
    assert len({c.uid for c in found}) == len(found) and all(CUTS not in c.meta for c in found)
    assert {c.meta["thread"] for c in found} <= {"u"}
    return [[f"{turn.role[0]}: {turn.content}" for turn in c.turns] for c in found]


@pytest.mark.parametrize(
    ("dropped", "clean"),
    [
        ("[deleted]", {}),
        ("<Media omitted>", {}),
        ("   ", {}),
        ("ok", {"min_turn_chars": 3}),
        ("I am a bot, and this action was performed automatically.", {"drop_bots": True}),
        ("Too many requests in 1 hour. Try again later.", {"drop_provider_errors": True}),
        ("and the", {"stop_words": {"drop_turns": True, "languages": ["en"]}}),
    ],
)
def test_a_dropped_turn_cuts_the_dialogue(dropped: str, clean: dict[str, Any]) -> None:
    if "stop_words" in clean:
        pytest.importorskip("stopwordsiso", reason="needs the extra chatmill[data]")
    question = talk(
        "u: which city", "a: Paris in spring", f"u: {dropped}", "a: Rome in autumn", "u: why Rome", "a: warm stones"
    )
    assert samples(question, clean) == [["u: which city", "a: Paris in spring"], ["u: why Rome", "a: warm stones"]]
    reply = talk("u: which city", f"a: {dropped}", "u: explain Rome", "a: warm stones")
    assert samples(reply, clean) == [["u: explain Rome", "a: warm stones"]]  # not an answer to both questions


def test_every_piece_keeps_the_system_turn_and_pairs_stay_inside_it() -> None:
    chat = talk("s: Be kind.", "u: one two", "a: three", "u: [deleted]", "u: four", "a: five", "u: six", "a: seven")
    assert samples(chat) == [
        ["s: Be kind.", "u: one two", "a: three"],
        ["s: Be kind.", "u: four", "a: five", "u: six", "a: seven"],
    ]
    assert samples(chat, mode="pairs") == [
        ["s: Be kind.", "u: one two", "a: three"],
        ["s: Be kind.", "u: four", "a: five"],
        ["s: Be kind.", "u: four", "a: five", "u: six", "a: seven"],
    ]


def test_a_system_message_between_two_replies_does_not_join_them() -> None:
    joined = talk("u: one", "a: two", "s: Ann joined", "a: three", "u: four", "a: five")
    assert samples(joined) == [["u: one", "a: two"], ["u: four", "a: five"]]
    beside = talk("u: one", "s: Ann joined", "a: two")
    assert samples(beside) == [["u: one", "a: two"]]


def test_a_dropped_system_turn_and_dropped_edges_cut_nothing() -> None:
    assert samples(talk("s: ", "u: one", "a: two")) == [["u: one", "a: two"]]
    assert samples(talk("u: [deleted]", "u: one", "a: two", "u: [deleted]")) == [["u: one", "a: two"]]


def test_the_cut_is_counted_and_nothing_is_counted_twice() -> None:
    ledger = Ledger("samples")
    cleaned = Cleaner(CleanSection(min_dialogue_chars=0)).apply(
        talk("s: Be kind.", "u: one", "a: two", "u: [deleted]", "a: three", "u: four", "a: five"), Ledger()
    )
    assert cleaned is not None and cleaned.meta[CUTS] == [3]
    assert len(list(make_samples(cleaned, PairSection(), ledger))) == ledger.kept == 2
    assert ledger.changed == {
        "cut where a turn was dropped": 1,
        "turns before the first user turn, after the last reply, or of the system later on left out": 1,
    }
    assert [start for start, _ in parts(cleaned)] == [1, 3]


def test_an_empty_message_of_a_chat_does_not_join_what_its_neighbour_said_before_and_after() -> None:
    said = [("Ann", "one"), ("Bob", "two"), ("Ann", ""), ("Bob", "three"), ("Ann", "four"), ("Bob", ""), ("Bob", "five")]
    found = to_conversation([ChatMessage(*message) for message in said], source="s", origin="o", ledger=Ledger())
    assert found is not None and found.meta[CUTS] == [2]
    assert samples(Conversation("u", found.turns, "s", "o", {CUTS: found.meta[CUTS]})) == [
        ["u: one", "a: two"],
        ["u: four", "a: five"],
    ]
