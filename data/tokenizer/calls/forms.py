"""The forms in which model families write calls of tools, and how to read them back.

    form = find_form(template, abilities);  words, calls = form.read(text)

Which form a checkpoint has is found by rendering a call with its own template: the first known form that reads this call back
is it. A text that is no whole call stays text. Special tokens must not have been left out of the text: several families mark
calls with them. `find_marks` finds in the same way what stands around a thought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..budget import TemplateRefusedError
from ..template import ChatTemplate
from .abilities import KEY, NAME, PROBE_TOOL, USER, VALUE, Abilities, probe_call

_DECODER = json.JSONDecoder()
OPENED = re.compile(r"<(\w+)>\s*$")  # at the end of a prompt


@dataclass(frozen=True, slots=True)
class Call:
    """arguments: a JSON object."""

    name: str
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        """The arguments as JSON."""
        return json.dumps(self.arguments, ensure_ascii=False)


# A text that begins with a call -> (the calls, characters used); None if it does not.
Reader = Callable[[str], tuple[list[Call], int] | None]


@dataclass(frozen=True, slots=True)
class Form:
    """starts: what a call begins with, anywhere in a reply; none: a call is a whole reply, which `may_be` tells from its first
    characters. around: what the template prints before the name, between name and arguments, and behind them, where the
    arguments are JSON.
    """

    name: str
    starts: tuple[str, ...]
    reader: Reader
    may_be: re.Pattern[str] | None = None
    around: tuple[str, str, str] | None = None

    def read(self, text: str) -> tuple[str, list[Call]]:
        """(words, calls) of a whole reply. What is no whole call stays in the words."""
        words, calls, at = list[str](), list[Call](), 0
        while at < len(text):
            start = self._next(text, at)
            found = None if start is None else self.reader(text[start:])
            if start is None or found is None:
                stop = len(text) if start is None else start + 1
                words.append(text[at:stop])
                at = stop
                continue
            words.append(text[at:start])
            calls += found[0]
            at = start + found[1]
        return "".join(words).strip("\n") if calls else text, calls

    def _next(self, text: str, at: int) -> int | None:
        """Where a call may begin."""
        if not self.starts:
            return 0 if at == 0 else None
        found = [place for start in self.starts if (place := text.find(start, at)) >= 0]
        return min(found) if found else None


def _json_at(text: str, at: int = 0) -> tuple[Any, int] | None:
    """(value, where it ends) of the JSON that a text has there, blanks before it passed over."""
    while at < len(text) and text[at].isspace():
        at += 1
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None


def _call_of(value: Any) -> Call | None:
    """{"name", "arguments" or "parameters"}; arguments may be JSON in a text."""
    if not isinstance(value, dict):
        return None
    value = value.get("function") if isinstance(value.get("function"), dict) else value
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    name = value.get("name")
    return Call(name, arguments) if isinstance(name, str) and name and isinstance(arguments, dict) else None


def _calls_of(value: Any) -> list[Call] | None:
    found = [_call_of(item) for item in (value if isinstance(value, list) else [value])]
    calls = [call for call in found if call is not None]
    return calls if calls and len(calls) == len(found) else None


def _tagged(opening: str, closing: str) -> Reader:
    """JSON between two marks; the closing one may be missing at the end of a reply."""

    def read(text: str) -> tuple[list[Call], int] | None:
        if not text.startswith(opening) or (found := _json_at(text, len(opening))) is None:
            return None
        calls, rest = _calls_of(found[0]), text[found[1] :]
        end = len(rest) - len(rest.lstrip())
        if calls is None or not (rest.startswith(closing, end) or not rest.strip()):
            return None
        return calls, found[1] + (end + len(closing) if rest.startswith(closing, end) else len(rest))

    return read


def _xml(text: str) -> tuple[list[Call], int] | None:
    """Qwen3-Coder: <tool_call> <function=name> <parameter=key> value </parameter> … </function> </tool_call>."""
    whole = re.match(r"<tool_call>\s*<function=([^>\s]+)>(.*?)</function>\s*</tool_call>", text, re.DOTALL)
    if whole is None:
        return None
    pairs = re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", whole[2], re.DOTALL)
    return [Call(whole[1], {key: _value(value) for key, value in pairs})], whole.end()


def _pairs(text: str) -> tuple[list[Call], int] | None:
    """GLM-4.5: <tool_call>name <arg_key>key</arg_key> <arg_value>value</arg_value> … </tool_call>."""
    whole = re.match(r"<tool_call>\s*([^\s<{]+)\s*((?:<arg_key>.*?</arg_value>\s*)*)</tool_call>", text, re.DOTALL)
    if whole is None:
        return None
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", whole[2], re.DOTALL)
    return [Call(whole[1], {key.strip(): _value(value) for key, value in pairs})], whole.end()


def _value(text: str) -> Any:
    """A value that is written without quotes: JSON if it is JSON other than a text, else a text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(found, str) else found


def _bare(text: str) -> tuple[list[Call], int] | None:
    """Llama 3: a whole reply of {"name", "parameters"}, several after each other with `;`, perhaps behind <|python_tag|>."""
    at, calls = text.startswith("<|python_tag|>") * len("<|python_tag|>"), list[Call]()
    if not text[at:].lstrip().startswith("{"):
        return None
    while (found := _json_at(text, at)) is not None and (call := _call_of(found[0])) is not None:
        if "name" not in found[0] or not {"parameters", "arguments"} & found[0].keys():
            return None
        calls.append(call)
        separator = re.compile(r"\s*;?\s*").match(text, found[1])
        at = separator.end() if separator else found[1]
    return (calls, len(text)) if calls and not text[at:].strip() else None


def _mistral(text: str) -> tuple[list[Call], int] | None:
    """[TOOL_CALLS][{…}, {…}], or of later versions [TOOL_CALLS]name[CALL_ID]id[ARGS]{…} for each call."""
    head = "[TOOL_CALLS]"
    if not text.startswith(head):
        return None
    later = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)").match(text, len(head))
    found = _json_at(text, later.end() if later else len(head))
    if found is None:
        return None
    if later is not None:
        return ([Call(later[1], found[0])], found[1]) if isinstance(found[0], dict) else None
    calls = _calls_of(found[0])
    return None if calls is None else (calls, found[1])


def _deepseek(text: str) -> tuple[list[Call], int] | None:
    """DeepSeek V3 (function, name and a fence) and V3.1 (name and JSON)."""
    calls = list[Call]()
    opening = re.match(r"(?:<｜tool▁calls▁begin｜>)?\s*", text)
    at = opening.end() if opening else 0
    one = re.compile(r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?([^\n<]+?)\s*(?:<｜tool▁sep｜>|\n)\s*(?:```json\s*)?")
    while (head := one.match(text, at)) is not None:
        found = _json_at(text, head.end())
        if found is None or not isinstance(found[0], dict):
            return None
        calls.append(Call(head[1], found[0]))
        tail = re.compile(r"\s*(?:```)?\s*(?:<｜tool▁call▁end｜>)?").match(text, found[1])
        at = tail.end() if tail else found[1]
    closing = re.compile(r"\s*<｜tool▁calls▁end｜>").match(text, at)
    return (calls, closing.end() if closing else at) if calls else None


def _named(text: str) -> tuple[list[Call], int] | None:
    """GLM-4: a whole reply of the name, a line feed and the arguments."""
    head = re.match(r"\s*([\w.-]+)\n(?=\s*\{)", text)
    found = None if head is None else _json_at(text, head.end())
    if head is None or found is None or not isinstance(found[0], dict) or text[found[1] :].strip():
        return None
    return [Call(head[1], found[0])], len(text)


def _harmony(text: str) -> tuple[list[Call], int] | None:
    """gpt-oss: ` to=functions.name<|channel|>commentary json<|message|>{…}`, or the recipient behind the channel."""
    head = re.match(
        r"(?:<\|start\|>assistant)?(?:<\|channel\|>commentary)?\s*to=functions\.([\w.-]+)\s*(?:<\|channel\|>commentary)?\s*"
        r"(?:<\|constrain\|>)?(?:json|code)?\s*<\|message\|>", text
    )  # fmt: skip
    found = None if head is None else _json_at(text, head.end())
    if head is None or found is None or not isinstance(found[0], dict):
        return None
    end = re.compile(r"\s*(?:<\|call\|>)?").match(text, found[1])
    return [Call(head[1], found[0])], end.end() if end else found[1]


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("hermes", ("<tool_call>",), _tagged("<tool_call>", "</tool_call>")),
        Form("qwen3-coder", ("<tool_call>",), _xml),
        Form("glm-4.5", ("<tool_call>",), _pairs),
        Form("mistral", ("[TOOL_CALLS]",), _mistral),
        Form("deepseek", ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"), _deepseek),
        Form("phi-4", ("<|tool_call|>",), _tagged("<|tool_call|>", "<|/tool_call|>")),
        Form("harmony", ("<|start|>assistant to=", "<|channel|>commentary to=", " to=functions."), _harmony),
        Form("llama3", (), _bare, re.compile(r"\s*(?:\{|<(?:\||$)(?:p|$)|$)")),
        Form("glm-4", (), _named, re.compile(r"\s*[\w.-]*(?:\n\s*(?:\{|$)|$)")),
    )
}


def find_form(template: ChatTemplate, can: Abilities) -> Form | None:
    """The form of a template's calls; None if it prints none, or in no form that is known here."""
    if can.calls is None:
        return None
    more: Mapping[str, Any] = {"tools": [PROBE_TOOL]}
    said = _said(template, probe_call(can.calls, can.needs_ids), more)
    if said is None:
        return None
    wanted = [Call(NAME, {KEY: VALUE})]
    for form in FORMS.values():
        tries = [said] if form.starts else [said, *_without_end(said)]
        if any(form.read(one)[1] == wanted for one in tries):
            return replace(form, around=_around(said))
    return None


def find_marks(template: ChatTemplate) -> tuple[str, str] | None:
    """What opens and closes a thought in a reply; None where replies have none that the template knows of."""
    said = _said(template, {"role": "assistant", "content": "answer", "reasoning_content": VALUE}, {})
    if said is not None and VALUE in said:
        before, _, after = said.partition(VALUE)
        closing = re.match(r"\s*(<[^<>]+>|\[[^\[\]]+\])", after)
        if closing is not None:
            opening = before.strip() or closing[1].replace("/", "", 1)  # the prompt opens it
            return opening, closing[1]
    return ("<think>", "</think>") if "</think>" in template.source else None


def _said(template: ChatTemplate, reply: Mapping[str, Any], more: Mapping[str, Any]) -> str | None:
    """What the template prints for a reply behind its prompt, or behind the prompt without the thought that it opens."""
    try:
        text, prompt = template.render([USER, reply], more=more), template.render([USER], add_generation_prompt=True, more=more)
    except TemplateRefusedError:
        return None
    if text.startswith(prompt):
        return text[len(prompt) :]
    opened = OPENED.search(prompt)
    if opened is not None and text.startswith(prompt[: opened.start()]):
        return f"\n</{opened[1]}>\n\n" + text[opened.start() :]
    return None


def _without_end(said: str) -> Iterator[str]:
    """A reply without the token behind it, for forms that are a whole reply."""
    for match in re.finditer(r"<[|｜][^<>]*[|｜]>|</?\w+>", said):
        yield said[: match.start()]


def _around(said: str) -> tuple[str, str, str] | None:
    """What stands before the name, between name and arguments, and behind the arguments, if these are JSON."""
    before, name, rest = said.partition(NAME)
    start = rest.find("{")
    found = _json_at(rest, start) if name and start >= 0 else None
    if found is None or found[0] != {KEY: VALUE}:
        return None
    return before, rest[:start], rest[found[1] :]
