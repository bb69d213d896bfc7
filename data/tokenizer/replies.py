"""Where the replies of a dialogue lie in its text, and where each of them ends.

    finder = ReplyFinder(template, special=["<|im_end|>"], added=[])
    found = finder.find(messages, supervised=[1, 3])      # found.text, found.cuts, found.spans

The reply to messages[:i] is what the model says after the prompt that inference sends for it, which is the rendering of
messages[:i] with add_generation_prompt. What it says is read from the rendering of messages[:i + 1], where it comes last: its
text and the end-of-turn token behind it. A whole dialogue may be learned in one piece only if each supervised reply stands in
it exactly so, behind the same prompt. Its end may be another token than that of a last reply (`<|end|>` and `<|return|>`), but
must be one that ends a turn elsewhere, never the first token of the next turn. Otherwise OneSamplePerReplyError says that the
dialogue must be cut (data/samples/per_reply.py).

Templates of models that think aloud drop earlier thoughts, and some open the thought in the prompt (`<think>`). There the text
of a last reply is the prompt, the rest of the reply, and the template's own end of a turn; a reply without a thought closes an
empty one. Any other loss of a reply's text is refused.

`find` gets the same from one rendering with markers in place of the contents, cached by the sequence of roles, where contents
do not change what the template prints. data/tokenizer/proof.py checks the result in another way.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from .budget import TemplateRefusedError
from .calls.abilities import USER, Abilities, find_abilities, probe_call
from .calls.messages import is_plain
from .calls.saying import check_said, last_token, with_thought_inside
from .template import ChatTemplate, Message

More = Mapping[str, Any]  # further variables of the template, `tools` for example
MARK = "\ue000999999999\ue001"  # digits survive filters such as `upper`
_OPENED = re.compile(r"<(\w+)>(\s*)$")


class OneSamplePerReplyError(TemplateRefusedError):
    """A dialogue that the template renders otherwise than reply by reply, as it would be asked for."""


@dataclass(frozen=True, slots=True)
class Replies:
    """text: the dialogue. cuts: characters where a reply begins behind its prompt, ascending.

    spans: of each supervised reply, by message, the characters where it begins, where its end-of-turn token begins and where
    this ends.
    """

    text: str
    cuts: list[int]
    spans: dict[int, tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class _Last:
    """A reply that comes last: text = prompt + said + rest; rest[end[0]:end[1]] is the end-of-turn token."""

    prompt: str
    said: str
    rest: str
    end: tuple[int, int]

    @property
    def text(self) -> str:
        return self.prompt + self.said + self.rest


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """literals: what stands around the contents. lead: how far before its content a reply begins, None where its prompt is not
    how the dialogue begins. ends: (gap to its end-of-turn token, length of this), None where it cannot be learned in place.
    """

    literals: list[str]
    lead: list[int | None]
    ends: list[tuple[int, int] | None]


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first; nothing if there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(strings, key=lambda t: (-len(t), t))) or r"(?!)")


class ReplyFinder:
    """special, added: strings of the tokenizer's special tokens, and of all tokens added to its vocabulary."""

    def __init__(self, template: ChatTemplate, special: Iterable[str], added: Iterable[str]) -> None:
        self.template = template
        self._special = [t for t in special if t.strip()]
        self._tokens = any_of(self._special), any_of(t for t in added if t.strip())
        self._skeleton = lru_cache(maxsize=4096)(self._make_skeleton)
        # Dialogues of many lengths begin alike: what one of them has as its last reply, longer ones have inside.
        self._marked_prompt = lru_cache(maxsize=512)(self._make_marked_prompt)
        self._marked_reply = lru_cache(maxsize=512)(self._make_marked_reply)

    # -- the end of a turn

    @property
    def turn_ends(self) -> tuple[str, ...]:
        """The tokens with which replies end: the last of a dialogue, then one before another turn."""
        roles = ["user", "assistant", "user", "assistant"]
        marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        self.template.render(marked[:2])  # a template that cannot render a reply is refused here
        found = list[str]()
        for length in (2, 4):
            try:
                replies = self.find(marked[:length], range(1, length, 2))
            except TemplateRefusedError:  # it ends no turn with a token, or needs one sample per reply; said when it is used
                continue
            found += [replies.text[start:stop] for _, start, stop in replies.spans.values()]
        if self.abilities.calls is not None:
            reply = self._call_as_last([USER, probe_call(self.abilities.calls, self.abilities.needs_ids)])
            found.append(reply.rest[: reply.end[1]])
        return tuple(dict.fromkeys(found))

    @cached_property
    def abilities(self) -> Abilities:
        """What the template prints beside words; calls only where something ends them."""
        found = find_abilities(self.template)
        try:
            if found.calls is not None:
                self._call_as_last([USER, probe_call(found.calls, found.needs_ids)])
        except TemplateRefusedError:
            found = replace(found, calls=None)
        return found

    @cached_property
    def _call_ends(self) -> re.Pattern[str]:
        """Tokens with which a call may end: special ones, and the one that ends a reply in words."""
        ends = list[str]()
        with suppress(TemplateRefusedError):
            reply = self._marked_reply(("user", "assistant"))
            ends.append(reply.rest[slice(*reply.end)])
        return any_of([*self._special, *ends])

    def _end_in(self, rest: str) -> tuple[int, int] | None:
        """The first special token of what follows a turn, else the first added one."""
        return next((match.span() for tokens in self._tokens if (match := tokens.search(rest))), None)

    @lru_cache(maxsize=1)  # noqa: B019 (one small text per tokenizer)
    def _user_end(self) -> str | None:
        """The token that ends a user's turn where nothing follows it."""
        try:
            _, mark, rest = self.template.render([{"role": "user", "content": MARK}]).partition(MARK)
        except TemplateRefusedError:
            return None
        end = self._end_in(rest) if mark else None
        return rest[end[0] : end[1]] if end else None

    def _end_at(self, text: str, at: int, last: str) -> str | None:
        """The token at text[at:], if it ends turns. last: the one that ends the reply when it comes last."""
        return next((token for token in (last, self._user_end()) if token and text.startswith(token, at)), None)

    # -- one reply, as the last

    def _as_last(
        self, messages: Sequence[Message], prompt: str | None = None, as_given: bool = False, more: More | None = None
    ) -> _Last:
        """The last message as the reply to those before it. Raises TemplateRefusedError if its text would be lost.

        prompt: the one before it, if it is known. as_given: the template certainly prints these contents as it prints markers.
        """
        *before, last = messages
        prompt = self.template.render(before, add_generation_prompt=True, more=more) if prompt is None else prompt
        opened = _OPENED.search(prompt)
        if last.get("tool_calls"):
            return self._call_as_last(messages, prompt, more)
        if last.get("reasoning_content"):
            last = self._with_its_thought(before, last, opened, more)
        content = last["content"]
        head, mark, rest = self.template.render([*before, {**last, "content": MARK}], more=more).partition(MARK)
        if not mark or MARK in rest:
            often = "more than once" if mark else "nowhere"
            raise TemplateRefusedError(f"chat template: it prints the text of a reply {often}\nThis is message {len(before)}.")
        end = self._end_in(rest)
        if end is None:
            raise TemplateRefusedError("chat template: no end-of-turn token after a reply; it must end with a special token")
        text = head + content + rest if as_given else self.template.render([*before, last], more=more)
        if text.startswith(prompt) and text.endswith(rest) and len(text) >= len(prompt) + len(rest):
            said = text[len(prompt) : len(text) - len(rest)]
            lead = head[len(prompt) :] if head.startswith(prompt) else ""
            if _holds(said, _without(opened, content), lead):
                return _Last(prompt, said, rest, end)
        return _Last(prompt, self._continue(prompt, head, text.removesuffix(rest), content), rest, end)

    def _with_its_thought(
        self, before: Sequence[Message], last: Message, opened: re.Match[str] | None, more: More | None
    ) -> Message:
        """A reply as the template prints its thought: where it only opens one in the prompt, the thought is text."""
        bare = {key: value for key, value in last.items() if key != "reasoning_content"}
        if self.template.render([*before, last], more=more) != self.template.render([*before, bare], more=more):
            return last
        return bare if opened is None else with_thought_inside(bare, last["reasoning_content"], opened[1])

    def _call_as_last(self, messages: Sequence[Message], prompt: str | None = None, more: More | None = None) -> _Last:
        """A reply that calls tools. It ends with the last token that the template prints for it."""
        if prompt is None:
            prompt = self.template.render(messages[:-1], add_generation_prompt=True, more=more)
        last, text = messages[-1], self.template.render(messages, more=more)
        opened, lead = _OPENED.search(prompt), ""
        at = len(prompt)
        if not text.startswith(prompt) and opened is not None and text.startswith(prompt[: opened.start()]):
            at = opened.start()  # the prompt opens a thought, which the template does not print in a reply
            lead = f"{last.get('reasoning_content') or ''}\n</{opened[1]}>\n\n"
        elif not text.startswith(prompt):
            raise TemplateRefusedError("chat template: the prompt before a reply is not a prefix of the dialogue")
        found = last_token(text[at:], self._call_ends)
        if found is None:
            raise TemplateRefusedError(
                "chat template: no end-of-turn token after a call of a tool; it must end with a special one"
            )
        said, rest = lead + text[at : at + found[0]], text[at + found[0] :]
        check_said(last, said)
        return _Last(prompt, said, rest, (0, found[1] - found[0]))

    def _continue(self, prompt: str, head: str, printed: str, content: str) -> str:
        """What the model says after a prompt that opens its thought, or whose template prints replies without theirs.

        head: what the template prints before a content without a thought; printed: all that it prints before the end.
        """
        opened = _OPENED.search(prompt)
        if opened is not None:
            start, tag = prompt[: opened.start()], opened[1]
            answers = _squeeze(printed).endswith(_squeeze(content.split(f"</{tag}>")[-1]))
            if answers and head.startswith(start) and _squeeze(head[len(start) :]) in ("", f"<{tag}></{tag}>"):
                said = _without(opened, content)
                return said if said != content or f"</{tag}>" in content else f"\n</{tag}>\n\n{content}"
        if not head.startswith(prompt):
            raise TemplateRefusedError("chat template: the prompt before a reply is not a prefix of the dialogue")
        _, thought, answer = content.rpartition("</think>")
        if thought and not prompt.rstrip().endswith("</think>") and _squeeze(printed) == _squeeze(prompt + answer):
            return head[len(prompt) :] + content
        raise TemplateRefusedError(
            f"chat template: it loses or changes text of a reply\nThe reply begins with {content[:60]!r}. Choose a template "
            "that prints it whole, or another form of the reply: the prompt may leave no room for a thought, for example."
        )

    # -- a dialogue

    def find(self, messages: Sequence[Message], supervised: Collection[int], more: More | None = None) -> Replies:
        """The text, and where the supervised replies lie in it. more: further variables of the template.

        Raises OneSamplePerReplyError if they cannot be learned in one piece, TemplateRefusedError if not at all.
        """
        if not more and all(map(is_plain, messages)) and (found := self._find_by_skeleton(messages, supervised)):
            return found
        return self.find_by_definition(messages, supervised, more)

    def find_by_definition(self, messages: Sequence[Message], supervised: Collection[int], more: More | None = None) -> Replies:
        """As `find`, with three renderings per reply."""
        last = len(messages) - 1
        found = {i: self._as_last(messages[: i + 1], more=more) for i in sorted(supervised)}
        text = found[last].text if last in found else self.template.render(messages, more=more)
        spans: dict[int, tuple[int, int, int]] = {}
        for i, reply in found.items():
            start, stop = len(reply.prompt), len(reply.prompt) + len(reply.said) + reply.end[0]
            own = reply.rest[slice(*reply.end)]
            token = own if i == last else self._end_at(text, stop, own)
            if token is None or not text.startswith(reply.text[:stop]):
                raise OneSamplePerReplyError(
                    f"chat template: a reply reads otherwise in the whole dialogue than as its last reply\nThis is message {i}."
                )
            spans[i] = (start, stop, stop + len(token))
        return Replies(text, self.cuts_by_definition(text, messages, more), spans)

    def cuts(self, text: str, messages: Sequence[Message], more: More | None = None) -> list[int]:
        """Characters of a text of these messages, a prompt for example, where a reply begins behind its prompt."""
        is_simple = not more and all(map(is_plain, messages))
        skeleton = self._skeleton(tuple(message["role"] for message in messages)) if is_simple else None
        if skeleton is not None:
            starts, whole = _fill(skeleton, messages)
            if text.startswith(whole) and whole == self.template.render(messages):
                return [at for at in starts.values() if at < len(text)]
        return self.cuts_by_definition(text, messages, more)

    def cuts_by_definition(self, text: str, messages: Sequence[Message], more: More | None = None) -> list[int]:
        """As `cuts`, with one rendering per reply."""
        found = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.template.render(messages[:i], add_generation_prompt=True, more=more)
                if len(prompt) < len(text) and text.startswith(prompt):
                    found.append(len(prompt))
        return sorted(set(found))

    def _find_by_skeleton(self, messages: Sequence[Message], supervised: Collection[int]) -> Replies | None:
        skeleton = self._skeleton(tuple(message["role"] for message in messages))
        if skeleton is None or any(skeleton.ends[i] is None for i in supervised):
            return None
        starts, text = _fill(skeleton, messages)
        if not self._prints_as_given(messages) and text != self.template.render(messages):
            return None
        spans: dict[int, tuple[int, int, int]] = {}
        for i in supervised:
            lead, end = skeleton.lead[i], skeleton.ends[i]
            assert lead is not None and end is not None
            stop = starts[i] + lead + len(messages[i]["content"]) + end[0]
            spans[i] = (starts[i], stop, stop + end[1])
        return Replies(text, list(starts.values()), spans)

    def _prints_as_given(self, messages: Sequence[Message]) -> bool:
        """Is it certain that the template prints these contents where it prints markers?"""
        return self.template.contents.certain([message["content"] for message in messages])

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        """None if markers do not survive.

        Replies between equal literals begin and end at the same place in them. So only the first and the last of them are
        rendered on their own; otherwise a chat of a thousand turns would cost half a million loop iterations.
        """
        marked = _marked(roles)
        literals = self.template.literals(roles)
        if literals is None:
            return None
        at, pieces = list[int](), [literals[0]]
        for message, literal in zip(marked, literals[1:], strict=True):
            at.append(sum(map(len, pieces[-2:])) + (at[-1] if at else 0))
            pieces += (message["content"], literal)
        text = "".join(pieces)
        lead: list[int | None] = [None] * len(roles)
        ends: list[tuple[int, int] | None] = [None] * len(roles)
        try:
            alike: dict[tuple[str, str], list[int]] = {}
            for i, role in enumerate(roles):
                if role == "assistant":
                    alike.setdefault((literals[i], literals[i + 1]), []).append(i)
            for same in alike.values():
                found = {self._in_place(text, marked[: i + 1], at[i], i == len(roles) - 1) for i in {same[0], same[-1]}}
                if len(found) != 1:
                    return None
                for i in same:
                    lead[i], ends[i] = next(iter(found))
        except TemplateRefusedError:
            return None
        return _Skeleton(literals, lead, ends)

    def _make_marked_prompt(self, roles: tuple[str, ...]) -> str:
        return self.template.render(_marked(roles), add_generation_prompt=True)

    def _make_marked_reply(self, roles: tuple[str, ...]) -> _Last:
        marked = _marked(roles)
        return self._as_last(marked, self._marked_prompt(roles[:-1]), self._prints_as_given(marked))

    def _in_place(
        self, text: str, messages: Sequence[Message], at: int, is_last: bool
    ) -> tuple[int | None, tuple[int, int] | None]:
        """(lead, end) of a marked reply whose content stands at text[at:]."""
        roles = tuple(message["role"] for message in messages)
        prompt = self._marked_prompt(roles[:-1])
        if len(prompt) > at or not text.startswith(prompt):
            return None, None
        lead, content = at - len(prompt), messages[-1]["content"]
        reply = self._marked_reply(roles)
        stop = at + len(content) + reply.end[0]
        own = reply.rest[slice(*reply.end)]
        token = own if is_last else self._end_at(text, stop, own)
        plain = reply.said == text[len(prompt) : at] + content and text.startswith(reply.text[:stop])
        return lead, (reply.end[0], len(token)) if plain and token else None


def _marked(roles: Sequence[str]) -> list[dict[str, str]]:
    """Messages with a marker for content."""
    return [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]


def _fill(skeleton: _Skeleton, messages: Sequence[Message]) -> tuple[dict[int, int], str]:
    """(where each reply begins that has a prompt in the text, the text)."""
    starts: dict[int, int] = {}
    pieces, position = [skeleton.literals[0]], len(skeleton.literals[0])
    for i, message in enumerate(messages):
        lead, content = skeleton.lead[i], message["content"]
        if lead is not None:
            starts[i] = position - lead
        pieces += (content, skeleton.literals[i + 1])
        position += len(content) + len(skeleton.literals[i + 1])
    return starts, "".join(pieces)


def _without(opened: re.Match[str] | None, content: str) -> str:
    """The content without the tag with which the prompt opens its thought."""
    if opened is None or not content.lstrip().startswith(f"<{opened[1]}>"):
        return content
    return content.lstrip()[len(opened[1]) + 2 :].removeprefix(opened[2])


def _squeeze(text: str) -> str:
    return "".join(text.split()).casefold()


def _holds(said: str, content: str, lead: str) -> bool:
    """Is the whole content said, but for blanks and case? lead: what the template puts before every content."""
    mine, theirs = _squeeze(said), _squeeze(content)
    return mine.endswith(theirs) and _squeeze(lead).startswith(mine[: len(mine) - len(theirs)])
