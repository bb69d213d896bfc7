"""A reply taken apart while it is made: its thought, its words, and its calls of tools.

    speech = Speech.of(tokenizer)                         # once per model
    parts = speech.parts(prompt_text, with_calls=True)    # once per reply
    for piece in pieces: show(parts.push(piece))
    show(parts.finish())

The text must hold special tokens (TextStream with skip_special=False), because some families mark calls and thoughts with them;
they are left out of words and thoughts here. Words and thoughts are passed on as they come; a call is passed on when it is
whole. What looks like a call and is none is passed on as words at the end of the reply, never an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ....data.tokenizer.calls.abilities import Abilities, find_abilities
from ....data.tokenizer.calls.forms import FORMS, Call, Form, find_form, find_marks
from ....data.tokenizer.tokenizer import ChatTokenizer

_CHANNEL = r"(?:<\|start\|>assistant)?<\|channel\|>\w+(?:\s*<\|constrain\|>\w+)?<\|message\|>|<\|start\|>assistant"


@dataclass(frozen=True, slots=True)
class Part:
    """text: of a thought or words. call: a whole call."""

    kind: Literal["thought", "words", "call"]
    text: str = ""
    call: Call | None = None


@dataclass(frozen=True, slots=True)
class Speech:
    """How a model's replies are written.

    form: of calls; None if it has none that is known. marks: around a thought, if any. can: what the template prints.
    """

    form: Form | None
    marks: tuple[str, str] | None
    can: Abilities
    special: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: ChatTokenizer, form: str | None = None) -> Speech:
        """What the tokenizer's template says. form: use this one of FORMS instead of the one that is found."""
        can = find_abilities(tokenizer.template)
        found = find_form(tokenizer.template, can)
        found = found if form is None or (found and found.name == form) else FORMS[form]
        special = "|".join(re.escape(t) for t in sorted(tokenizer.special, key=len, reverse=True) if t.strip())
        return cls(found, find_marks(tokenizer.template), can, re.compile(f"{_CHANNEL}|{special}" if special else _CHANNEL))

    def parts(self, prompt: str, with_calls: bool) -> ReplyParts:
        """The parts of the reply to a prompt."""
        opened = self.marks is not None and prompt.rstrip().endswith(self.marks[0])
        return ReplyParts(self, opened, self.form if with_calls else None)


class ReplyParts:
    """One reply. opened: the prompt has opened its thought."""

    def __init__(self, speech: Speech, opened: bool, form: Form | None) -> None:
        self._marks, self._special, self._form = speech.marks, speech.special, form
        self._state: Literal["start", "thought", "words", "call"] = "thought" if opened else "start"
        self._held, self._has_words, self._thinks = "", False, False

    def push(self, text: str) -> list[Part]:
        """What is certain with this piece of text."""
        self._held += text
        found, state = list[Part](), None
        while state != self._state:  # one state may lead to the next
            state = self._state
            found += {"start": self._start, "thought": self._thought, "words": self._words, "call": list[Part]}[state]()
        return found

    def finish(self) -> list[Part]:
        """The rest, calls among them."""
        found = self.push("")
        if self._state == "thought":
            return [*found, *self._said("thought", self._held.rstrip())]
        words, calls = (self._held, list[Call]()) if self._form is None else self._form.read(self._held)
        self._held = ""
        return [
            *found,
            *self._said("words", words.rstrip("\n") if calls else words),
            *(Part("call", "", call) for call in calls),
        ]

    def _start(self) -> list[Part]:
        """Is there a thought?"""
        text = self._held.lstrip()
        if self._marks is None:
            self._state = "words"
        elif text.startswith(self._marks[0]):
            self._held, self._state = text[len(self._marks[0]) :], "thought"
        elif not self._marks[0].startswith(text):
            self._state = "words"
        return []

    def _thought(self) -> list[Part]:
        assert self._marks is not None
        thought, closing, rest = self._held.partition(self._marks[1])
        if closing:
            self._held, self._state = rest, "words"
            return self._said("thought", thought.rstrip())
        if not thought.strip():
            return []
        keep = _uncertain(thought, (self._marks[1],))
        self._held = thought[len(thought) - keep :]
        return self._said("thought", thought[: len(thought) - keep])

    def _words(self) -> list[Part]:
        if not self._has_words and self._marks is not None:
            self._held = self._held.lstrip("\n")  # behind a thought
        form = self._form
        if form is None:
            return self._release(len(self._held))
        if not form.starts:  # a call is a whole reply
            assert form.may_be is not None
            if not self._has_words and form.may_be.match(self._held):
                return []
            self._form = None
            return self._release(len(self._held))
        places = [at for start in form.starts if (at := self._held.find(start)) >= 0]
        if places:
            self._state = "call"
            return self._release(min(places))
        # Blanks before a call are no words.
        return self._release(len(self._held) - _uncertain(self._held, form.starts))

    def _release(self, count: int) -> list[Part]:
        text, self._held = self._held[:count], self._held[count:]
        return self._said("words", text.rstrip() if self._state == "call" else text)

    def _said(self, kind: Literal["thought", "words"], text: str) -> list[Part]:
        text = self._special.sub("", text)
        if kind == "thought" and not self._thinks:
            text = text.lstrip("\n")
            self._thinks = bool(text)
        self._has_words = self._has_words or (kind == "words" and bool(text))
        return [Part(kind, text)] if text else []


def _uncertain(text: str, starts: tuple[str, ...]) -> int:
    """Length of the tail of a text that may begin a mark, and of the blanks before it."""
    certain = text[: len(text) - _possible_start(text, starts)].rstrip()
    return len(text) - len(certain)


def _possible_start(text: str, starts: tuple[str, ...]) -> int:
    """Length of the longest tail of a text that is a proper beginning of one of these."""
    longest = max((len(start) - 1 for start in starts), default=0)
    tails = range(min(longest, len(text)), 0, -1)
    return next((size for size in tails if any(start.startswith(text[-size:]) for start in starts)), 0)
