"""Calls of tools in the published forms: read back as they were written, whole and piece by piece; what is none stays text."""

from __future__ import annotations

import re
from typing import Any

import pytest

from chatmill.data.tokenizer.calls.abilities import Abilities
from chatmill.data.tokenizer.calls.forms import FORMS, Call, find_form, find_marks
from chatmill.trainer.chat.tools.chat_reply import ChatReply
from chatmill.trainer.chat.tools.reply_parts import ReplyParts, Speech

from .published import tokenizer_for
from .test_serving_tokens import DEEPSEEK, MISTRAL
from .test_templates_of_the_wild import QWEN3

PARIS, TWO = Call("get_weather", {"city": "Paris", "days": 2}), Call("now", {})
WRITTEN: dict[str, tuple[str, list[Call]]] = {
    "hermes": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', [PARIS, TWO],
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>", [PARIS, TWO],
    ),
    "glm-4.5": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>", [PARIS],
    ),
    "mistral": ('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, "id": "123456789"}]', [PARIS]),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>", [PARIS, TWO],
    ),
    "phi-4": ('<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]<|/tool_call|>', [PARIS]),
    "harmony": (
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Paris", "days": 2}<|call|>', [PARIS],
    ),
    "llama3": ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}', [PARIS]),
    "glm-4": ('get_weather\n{"city": "Paris", "days": 2}', [PARIS]),
}  # fmt: skip
SPECIAL = re.compile("<｜tool▁calls▁end｜>")


def parts_of(form: str | None, pieces: list[str], marks: tuple[str, str] | None = None, opened: bool = False) -> list[Any]:
    """What a reply in pieces says, neighbours of one kind joined."""
    found = FORMS[form] if form else None
    reply = ReplyParts(Speech(found, marks, Abilities(), SPECIAL), opened, found)
    said: list[Any] = []
    for part in [*(p for piece in pieces for p in reply.push(piece)), *reply.finish()]:
        if part.kind != "call" and said and said[-1][0] == part.kind:
            said[-1] = (part.kind, said[-1][1] + part.text)
        else:
            said.append((part.kind, part.call or part.text))
    return said


@pytest.mark.parametrize("form", FORMS)
def test_calls_of_every_family_are_read_whole_and_letter_by_letter(form: str) -> None:
    text, calls = WRITTEN[form]
    assert FORMS[form].read(text) == ("", calls)
    wanted = [("call", call) for call in calls]
    assert parts_of(form, [text]) == parts_of(form, list(text)) == wanted
    if FORMS[form].starts and form != "harmony":
        said = [("words", "Let me look."), *wanted]
        assert parts_of(form, ["Let me look.\n\n", text]) == parts_of(form, list(f"Let me look.\n\n{text}")) == said


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_whole_call_is_text_and_never_an_error(form: str) -> None:
    text, _ = WRITTEN[form]
    for cut in range(1, len(text) - 1, 3):
        for broken in (text[:cut], text[:cut].replace('"', "'"), text[:cut] + "]]}}", "{" * cut):
            said = parts_of(form, [broken])
            words = "".join(part for kind, part in said if kind == "words")
            assert [kind for kind, _ in said if kind == "call"] or words == SPECIAL.sub("", broken)


def test_words_come_at_once_and_a_call_only_when_it_is_whole() -> None:
    reply = ChatReply(ReplyParts(Speech(FORMS["hermes"], None, Abilities(), SPECIAL), False, FORMS["hermes"]), parallel=True)
    assert reply.push("Hello <to") == [{"content": "Hello"}] and reply.push("day") == [{"content": " <today"}]
    assert reply.push(' <tool_call>{"name": "f", ') == [] and reply.push('"arguments": {"a": 1}}</tool_call>') == []
    opened, filled = reply.finish()
    (first,), (second,) = opened["tool_calls"], filled["tool_calls"]
    assert first["function"] == {"name": "f", "arguments": ""} and first["index"] == 0 and len(first["id"]) == 9
    assert second == {"index": 0, "function": {"arguments": '{"a": 1}'}} and reply.reason("stop") == "tool_calls"


def test_thoughts_are_split_off() -> None:
    marks = ("<think>", "</think>")
    for text, opened in (("<think>\nhm\n</think>\n\nYes.", False), ("hm\n</think>\n\nYes.", True)):
        for pieces in ([text], list(text)):
            assert parts_of(None, pieces, marks, opened) == [("thought", "hm"), ("words", "Yes.")]
    assert parts_of(None, list("<thin ice"), marks) == [("words", "<thin ice")]
    assert parts_of(None, ["<think>\nnever ends"], marks) == [("thought", "never ends")]
    call = WRITTEN["hermes"]
    assert parts_of("hermes", [f"<think>\nlook\n</think>\n\n{call[0]}"], marks)[0] == ("thought", "look")


def test_the_form_of_a_checkpoint_is_read_from_its_template() -> None:
    found = {}
    for name, source in {"Qwen3": QWEN3, "DeepSeek": DEEPSEEK, "Mistral": MISTRAL}.items():
        tokenizer = tokenizer_for(source)
        form = find_form(tokenizer.template, tokenizer.abilities)
        found[name] = (form.name if form else None, find_marks(tokenizer.template))
    thinking = ("<think>", "</think>")
    assert found == {"Qwen3": ("hermes", thinking), "DeepSeek": ("deepseek", thinking), "Mistral": ("mistral", None)}
