"""What a chat template can print beside words: declarations of tools, calls of them, and thoughts.

    can = find_abilities(template);  can.tools, can.calls, can.needs_ids

It is found by rendering a call with a name and a value that occur nowhere else. Arguments are given as an object, as
transformers' templates expect them, and as JSON in a text where a template takes nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..budget import TemplateRefusedError
from ..template import ChatTemplate

NAME, KEY, VALUE = "probe_of_tools", "probe_key", "probe value"
PROBE_ID = "call00000"
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "finds out",
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": "a value"}},
            "required": [KEY],
        },
    },
}
USER: dict[str, Any] = {"role": "user", "content": "question"}


@dataclass(frozen=True, slots=True)
class Abilities:
    """tools: declarations are printed. calls: the form in which arguments must come; None: calls are not printed.

    needs_ids: the template refuses calls and results without ids. thoughts: reasoning_content of a last reply is printed.
    """

    tools: bool = False
    calls: Literal["object", "string"] | None = None
    needs_ids: bool = False
    thoughts: bool = False


def probe_call(form: str, with_id: bool = False) -> dict[str, Any]:
    """A reply that is one call."""
    arguments: Any = {KEY: VALUE} if form == "object" else json.dumps({KEY: VALUE})
    call = {"type": "function", "function": {"name": NAME, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": PROBE_ID, **call} if with_id else call]}


def find_abilities(template: ChatTemplate) -> Abilities:
    """Render probes."""
    more: Mapping[str, Any] = {"tools": [PROBE_TOOL]}
    shown = _rendered(template, [USER], more)
    has_tools = shown is not None and NAME in shown
    thought = _rendered(template, [USER, {"role": "assistant", "content": "answer", "reasoning_content": VALUE}], {})
    thoughts = thought is not None and VALUE in thought
    forms: tuple[Literal["object", "string"], ...] = ("object", "string")
    for with_id in (False, True):
        for form in forms:
            call = probe_call(form, with_id)
            result = {"role": "tool", "name": NAME, "content": "result", **({"tool_call_id": PROBE_ID} if with_id else {})}
            text = _rendered(template, [USER, call], more)
            went_on = _rendered(template, [USER, call, result], more)
            # As a text inside a text the quotes would be escaped: `"{\"probe_key\"`.
            if text is not None and went_on is not None and NAME in text and VALUE in text and '\\"' not in text:
                return Abilities(has_tools, form, with_id, thoughts)
    return Abilities(has_tools, thoughts=thoughts)


def _rendered(template: ChatTemplate, messages: list[dict[str, Any]], more: Mapping[str, Any]) -> str | None:
    try:
        return template.render(messages, more=more)
    except TemplateRefusedError:
        return None
