"""Planted personal data is found; what only looks like it is left alone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from chatmill.data.clean import Cleaner
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.ledger import Ledger
from chatmill.data.privacy import find, iban_is_valid, luhn
from chatmill.data.recipe import CleanSection, PrivacySection

Plant = Callable[[random.Random], str]


def digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(n))


def letters(
    rng: random.Random, n: int, alphabet: str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
) -> str:
    return "".join(rng.choice(alphabet) for _ in range(n))


def card(rng: random.Random) -> str:
    body = rng.choice("456") + digits(rng, 14)
    check = next(d for d in "0123456789" if luhn(body + d))
    number = body + check
    return rng.choice(
        [number, " ".join(number[k : k + 4] for k in range(0, 16, 4)), "-".join(number[k : k + 4] for k in range(0, 16, 4))]
    )


def iban(rng: random.Random) -> str:
    body = digits(rng, 18)
    check = next(f"{c:02d}" for c in range(2, 99) if iban_is_valid(f"DE{c:02d}{body}"))
    number = f"DE{check}{body}"
    return rng.choice([number, " ".join(number[k : k + 4] for k in range(0, 22, 4))])


PLANTS: dict[str, list[Plant]] = {
    "email": [
        lambda r: f"{letters(r, 6)}.{letters(r, 5)}@{letters(r, 7).lower()}.{r.choice(['com', 'co.uk', 'de', 'museum'])}",
        lambda r: f"{letters(r, 4)}+news_{digits(r, 2)}@mail-{digits(r, 1)}.org",
    ],
    "phone": [
        lambda r: f"({r.randint(201, 989)}) {r.randint(200, 999)}-{digits(r, 4)}",
        lambda r: f"{r.randint(201, 989)}-{r.randint(200, 999)}-{digits(r, 4)}",
        lambda r: f"+49 {r.randint(151, 179)} {digits(r, 8)[:4]} {digits(r, 4)}",
        lambda r: f"+44 20 7{digits(r, 3)} {digits(r, 4)}",
        lambda r: f"+33 6 {digits(r, 2)} {digits(r, 2)} {digits(r, 2)} {digits(r, 2)}",
        lambda r: f"+1{r.randint(201, 989)}{r.randint(200, 999)}{digits(r, 4)}",
        lambda r: f"{r.randint(201, 989)}.{r.randint(200, 999)}.{digits(r, 4)}",
        lambda r: f"030/{r.randint(200, 999)}{digits(r, 4)}",
    ],
    "ip": [
        lambda r: f"{r.randint(1, 223)}.{r.randint(0, 255)}.{r.randint(0, 255)}.{r.randint(1, 254)}".replace("127.", "12."),
        lambda r: ":".join(f"{r.randint(1, 65535):x}" for _ in range(8)),
        lambda r: f"2a01:{r.randint(256, 65535):x}::{r.randint(256, 65535):x}",
    ],
    "card": [card],
    "iban": [iban],
    "key": [
        lambda r: "sk-" + letters(r, 48),
        lambda r: "ghp_" + letters(r, 36),
        lambda r: "AKIA" + letters(r, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
        lambda r: "xoxb-" + digits(r, 12) + "-" + letters(r, 24),
        lambda r: "hf_" + letters(r, 34),
    ],
    "credentials": [lambda r: f"{letters(r, 5)}:{letters(r, 9)}"],
}
FRAMES = [
    "you can reach me at {} tomorrow",
    "{}",
    "it is {}, ok?",
    "my old one was ({}) I think",
    "write this down: {}.",
    "see {}\nthanks",
]
# What a careless pattern takes for private data.
HARMLESS: list[Plant] = [
    lambda r: f"20{digits(r, 2)}-0{r.randint(1, 9)}-1{digits(r, 1)}",
    lambda r: f"{r.randint(1, 12)}/{r.randint(1, 28)}/20{digits(r, 2)}",
    lambda r: f"version {r.randint(1, 9)}.{r.randint(0, 9)}.{r.randint(0, 9)}.{r.randint(0, 9)}",
    lambda r: f"order {digits(r, 9)}",
    lambda r: f"{r.randint(1, 999)},{digits(r, 3)},{digits(r, 3)}.{digits(r, 2)} dollars",
    lambda r: f"pi is 3.{digits(r, 12)}",
    lambda r: f"{r.randint(10, 23)}:{r.randint(10, 59)}:{r.randint(10, 59)}",
    lambda r: f"lol @{letters(r, 8)} you and me @ home.",
    lambda r: f"isbn 978-{digits(r, 1)}-{digits(r, 2)}-{digits(r, 6)}-{digits(r, 1)}",
    lambda r: f"scored {r.randint(10, 99)}-{r.randint(10, 99)} in {r.randint(1950, 2020)}-{digits(r, 2)}",
    lambda r: f"std::vector<int>::iterator at ::{letters(r, 5)}",
    lambda r: f"sha {letters(r, 40, '0123456789abcdef')}",
    lambda r: f"ask-me-anything-about-{letters(r, 12).lower()}",
    lambda r: "localhost is 127.0.0.1 or ::1",
    lambda r: f"https://example.com/a:{digits(r, 3)}/b@c",
    lambda r: (
        f"from {r.randint(1900, 1999)} to {r.randint(2000, 2024)}, {r.randint(1, 9)} {digits(r, 3)} {digits(r, 3)} people"
    ),
]


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_data_is_found_with_its_exact_borders(kind: str) -> None:
    rng = random.Random(0)
    missed, total = [], 0
    for _ in range(400):
        secret = rng.choice(PLANTS[kind])(rng)
        text = rng.choice(FRAMES).format(f"https://{secret}@example.com/x" if kind == "credentials" else secret)
        total += 1
        if not any(f.kind == kind and text[f.start : f.end] == secret for f in find(text)):
            missed.append(text)
    assert len(missed) / total <= 0.02, missed[:5]


def test_what_only_looks_private_is_left_alone() -> None:
    rng = random.Random(0)
    wrong = []
    for plant in HARMLESS:
        for _ in range(60):
            text = rng.choice(["so {} you see", "{}"]).format(plant(rng))
            wrong += [(text, text[f.start : f.end], f.kind) for f in find(text)]
    assert len(wrong) / (60 * len(HARMLESS)) <= 0.01, wrong[:8]


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
