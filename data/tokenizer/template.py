"""Chat templates in a sandbox: from messages to text, and where in that text their contents lie.

    template = ChatTemplate(TEMPLATES["chatml"], {"eos_token": "<|im_end|>"})
    template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)

Templates are programs from downloaded folders, so they run in a sandbox with limits (data/tokenizer/sandbox.py).

Where the replies lie, and where each of them ends, is found in data/tokenizer/replies.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from chatmill.config import ConfigError

from .budget import TemplateRefusedError
from .sandbox import FIXED_DAY, Sandbox

Message = Mapping[str, Any]

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen2's template adds a system turn if there is none.
_QWEN = (
    "{% if messages and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + _CHATML
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TEMPLATES: dict[str, str] = {"chatml": _CHATML, "qwen": _QWEN, "llama3": _LLAMA3, "mistral": _MISTRAL, "zephyr": _ZEPHYR}

_MARK = re.compile("\ue000([0-9]+)\ue001")


class ChatTemplate:
    """One compiled template. variables: bos_token, eos_token … as the tokenizer names them."""

    def __init__(self, source: str, variables: Mapping[str, str | None]) -> None:
        self.source = source
        self._sandbox = Sandbox()
        self._template = self._sandbox.compile_template(source)
        self._names = frozenset(variables)
        self._variables = {key: value for key, value in variables.items() if value}
        self.clock: Callable[[], datetime] = lambda: FIXED_DAY
        self._literals = lru_cache(maxsize=4096)(self._find_literals)

    def take_time(self) -> None:
        """Let strftime_now tell what the clock shows now, until the next call. The clock shows a fixed day unless it is set."""
        self._sandbox.moment = self.clock()

    def check_variables(self, more: Mapping[str, Any]) -> None:
        """Raise ConfigError for variables that this template does not read, or that are not the client's to set."""
        own = {"messages", "add_generation_prompt", *self._names}
        offered = sorted(self._sandbox.variables_of(self.source) - own)
        for name in more:
            if name not in offered:
                known = f"it reads {', '.join(offered)}" if offered else "it reads none"
                raise ConfigError(f"the chat template takes no variable {name[:100]!r}: {known}.")

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, more: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a dialogue, as transformers renders it; with the header of the reply to come when asked for.

        more: further variables.
        """
        own = {"messages": [_as_given(m) for m in messages], "add_generation_prompt": add_generation_prompt, **self._variables}
        variables = {"tools": None, "documents": None, **(more or {}), **own}
        return self._sandbox.render(self._template, variables)

    def literals(self, roles: tuple[str, ...]) -> list[str] | None:
        """What the template prints around the contents of these roles, one text more than roles; None if markers in their
        place do not come out once each, in order."""
        return self._literals(roles)

    def own_system_message(self) -> str | None:
        """The message of the system that the template prints before a dialogue without one; None if it prints none."""
        given, absent = self.literals(("system", "user")), self.literals(("user",))
        if given is None or absent is None:
            return None
        before, between, text = given[0], given[1], absent[0]
        inside = text.startswith(before) and text.endswith(between) and len(text) > len(before) + len(between)
        return text[len(before) : len(text) - len(between)] if inside else None

    def content_spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """(text, [start, end) of each message's content in it); an empty span if the template leaves the content out.

        A content that the template strips is found as printed.
        """
        text, spans = self.render(messages), list[tuple[int, int]]()
        literals = self.literals(tuple(message["role"] for message in messages))
        if literals is not None:
            position = len(literals[0])
            for message, literal in zip(messages, literals[1:], strict=True):
                spans.append((position, position + len(message["content"])))
                position = spans[-1][1] + len(literal)
            if position == len(text) and all(text[a:b] == m["content"] for m, (a, b) in zip(messages, spans, strict=True)):
                return text, spans
        spans, last = [], 0
        for i, message in enumerate(messages):
            # at the marker: a search for the content itself would find "user" in the header of a user's turn
            start = self.render([*messages[:i], {"role": message["role"], "content": "\ue0000\ue001"}]).find("\ue0000\ue001")
            content = message["content"] if text.startswith(message["content"], start) else message["content"].strip()
            if start < last or not text.startswith(content, start):
                start, content = last, ""
            last = start + len(content)
            spans.append((start, last))
        return text, spans

    def _find_literals(self, roles: tuple[str, ...]) -> list[str] | None:
        try:
            text = self.render([{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)])
        except TemplateRefusedError:
            return None
        found = list(_MARK.finditer(text))
        if [int(match[1]) for match in found] != list(range(len(roles))):
            return None
        edges = [0, *(edge for match in found for edge in match.span()), len(text)]
        return [text[edges[k] : edges[k + 1]] for k in range(0, len(edges), 2)]


def _as_given(message: Message) -> dict[str, Any]:
    """What transformers hands to a template: no keys without a value, and reasoning under all the names that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    said = next((given[key] for key in ("reasoning_content", "thinking", "reasoning") if key in given), None)
    return given if said is None else {"thinking": said, **given, "reasoning_content": said}


def each_string(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [each_string(item, change) for item in value]
    return {change(k): each_string(v, change) for k, v in value.items()} if isinstance(value, Mapping) else value
