"""Chat templates in a sandbox: from messages to text, and where in that text their contents lie.

    template = ChatTemplate(TEMPLATES["chatml"], {"eos_token": "<|im_end|>"})
    template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)

Templates are programs from downloaded folders, so they run in a sandbox with limits (data/tokenizer/sandbox.py).

Where the replies lie, and where each of them ends, is found in data/tokenizer/replies.py. `template.contents` knows whether the
contents can change what is printed around them: where they cannot, a dialogue needs no rendering of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import nodes

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

    @cached_property
    def contents(self) -> Contents:
        """What the template does with the contents of messages."""
        return Contents(self._sandbox.parse(self.source))

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

    def content_spans(
        self, messages: Sequence[Message], more: Mapping[str, Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, [start, end) of each message's content in it); an empty span if the template leaves the content out.

        A content that the template strips is found as printed.
        """
        text, spans = self.render(messages, more=more), list[tuple[int, int]]()
        literals = self.literals(tuple(message["role"] for message in messages)) if not more else None
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
            marked = {"role": message["role"], "content": "\ue0000\ue001"}
            start = self.render([*messages[:i], marked], more=more).find("\ue0000\ue001")
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


# -- can contents change what is printed around them?

_CLEAN, _TEXT, _HOLDER = 0, 1, 2  # does not depend on contents; text with a content in it; messages, or one of them
_OF_ITS_KIND = frozenset(("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean"))
_METHODS = frozenset(name for kind in (str, dict, list) for name in dir(kind))
MOST_CHARS = 100_000  # a longer dialogue may use up the sandbox's budget, which only a rendering tells


class _DependsError(Exception):
    """The template looks into a content, or does what is not followed here."""


class Contents:
    """What a template does with the contents of messages, read from its source.

    Where it only puts them together with other texts, prints them, and strips them, no condition, loop or filter sees them.
    Then it prints whatever contents exactly where it prints markers, and only the roles decide what stands around them.
    """

    def __init__(self, parsed: nodes.Template) -> None:
        self._names: dict[str | tuple[str, str], int] = {"messages": _HOLDER}
        self._namespaces: set[str] = set()
        self._whole = False  # must contents be without blanks at their ends, and not empty?
        try:
            before = None
            while before != (before := (dict(self._names), set(self._namespaces))):  # what a loop sets may be read above
                self._follow(parsed.body)
            self.opaque = True
        except _DependsError:
            self.opaque = False

    def certain(self, contents: Sequence[str]) -> bool:
        """Do these contents come out as markers do?"""
        if not self.opaque or sum(map(len, contents)) > MOST_CHARS:
            return False
        return not self._whole or all(content and content == content.strip() for content in contents)

    def _follow(self, body: Sequence[nodes.Node]) -> None:
        for node in body:
            if isinstance(node, nodes.Output):
                if any(self._kind(child) == _HOLDER for child in node.nodes):
                    raise _DependsError
            elif isinstance(node, nodes.If):
                self._condition(node.test)
                self._follow([*node.body, *node.elif_, *node.else_])
            elif isinstance(node, nodes.For):
                self._loop(node)
            elif isinstance(node, nodes.Assign):
                self._assign(node)
            elif isinstance(node, nodes.Scope):
                self._follow(node.body)
            elif not isinstance(node, nodes.Break | nodes.Continue):
                raise _DependsError

    def _loop(self, node: nodes.For) -> None:
        kind = self._kind(node.iter)
        if kind == _TEXT or node.recursive or not isinstance(node.target, nodes.Name):
            raise _DependsError
        self._set(node.target.name, kind)
        if node.test is not None:
            self._condition(node.test)
        self._follow([*node.body, *node.else_])

    def _assign(self, node: nodes.Assign) -> None:
        target, value = node.target, node.node
        if isinstance(target, nodes.NSRef):
            self._set((target.name, target.attr), self._kind(value))
        elif not isinstance(target, nodes.Name):
            raise _DependsError
        elif isinstance(value, nodes.Call) and isinstance(value.node, nodes.Name) and value.node.name == "namespace":
            if value.args or value.dyn_args or value.dyn_kwargs:
                raise _DependsError
            self._namespaces.add(target.name)
            for pair in value.kwargs:
                self._set((target.name, pair.key), self._kind(pair.value))
        else:
            self._set(target.name, self._kind(value))

    def _set(self, name: str | tuple[str, str], kind: int) -> None:
        """A name may be set in several places; what it may be anywhere, it counts as everywhere."""
        if _HOLDER in (kind, self._names.get(name, kind)) and self._names.get(name, kind) != kind:
            raise _DependsError
        self._names[name] = max(kind, self._names.get(name, _CLEAN))

    def _condition(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.And | nodes.Or):
            self._condition(node.left)
            self._condition(node.right)
        elif isinstance(node, nodes.Not):
            self._condition(node.node)
        else:
            self._whole |= self._kind(node) == _TEXT  # true unless it is empty

    def _clean(self, *several: nodes.Node | None) -> int:
        if any(node is not None and self._kind(node) for node in several):
            raise _DependsError
        return _CLEAN

    def _kind(self, node: nodes.Node) -> int:
        match node:
            case nodes.Const() | nodes.TemplateData():
                return _CLEAN
            case nodes.Name(name=name):
                if name in self._namespaces or name in ("loop", "namespace"):  # known by their attributes alone
                    raise _DependsError
                return self._names.get(name, _CLEAN)
            case nodes.Getattr(node=owner, attr=name):
                return self._member(owner, name)
            case nodes.Getitem(node=owner, arg=nodes.Const(value=str(name))):
                return self._member(owner, name)
            case nodes.Getitem(node=owner, arg=nodes.Slice() | nodes.Const() | nodes.Neg() as at):
                self._clean(*at.iter_child_nodes())
                if self._kind(owner) == _TEXT:
                    raise _DependsError
                return self._kind(owner)
            case nodes.Call(node=nodes.Getattr(node=owner, attr="strip"), args=[], kwargs=[], dyn_args=None, dyn_kwargs=None):
                return self._stripped(owner)
            case nodes.Call(node=nodes.Getattr(node=owner, attr="get"), args=[nodes.Const(value=str(name))], kwargs=[]):
                return self._member(owner, name)
            case nodes.Call(node=nodes.Name(name="raise_exception" | "strftime_now" | "range"), dyn_args=None, dyn_kwargs=None):
                return self._clean(*node.args, *(pair.value for pair in node.kwargs))
            case nodes.Filter(node=nodes.Expr() as value, name="trim", args=[], kwargs=[]):
                return self._stripped(value)
            case nodes.Filter(node=nodes.Expr() as value, name="length" | "count", args=[], kwargs=[]):
                return _CLEAN if self._kind(value) == _HOLDER else self._clean(value)
            case nodes.Test(node=value, name=name) if name in _OF_ITS_KIND:
                self._kind(value)
                return _CLEAN
            case nodes.And(left=left, right=right) | nodes.Or(left=left, right=right):
                self._condition(left)
                return self._either(left, right)
            case nodes.Not(node=value):
                self._condition(value)
                return _CLEAN
            case nodes.CondExpr(test=test, expr1=one, expr2=other):
                self._condition(test)
                return self._kind(one) if other is None else self._either(one, other)
            case nodes.Add(left=left, right=right):
                return self._joined(left, right)
            case nodes.Concat(nodes=several):
                return self._joined(*several)
            case nodes.Filter() | nodes.Test() | nodes.Compare() | nodes.BinExpr() | nodes.UnaryExpr() | nodes.Literal() | \
                    nodes.Operand() | nodes.Pair() | nodes.Keyword() | nodes.Getitem():  # fmt: skip
                return self._clean(*node.iter_child_nodes())
        raise _DependsError

    def _member(self, owner: nodes.Expr, name: str) -> int:
        if isinstance(owner, nodes.Name) and owner.name in self._namespaces:
            return self._names.get((owner.name, name), _CLEAN)
        if isinstance(owner, nodes.Name) and owner.name == "loop":
            if name in ("first", "last", "index", "index0", "length", "revindex", "revindex0"):
                return _CLEAN
            raise _DependsError
        kind = self._kind(owner)
        if kind == _TEXT or name in _METHODS:
            raise _DependsError
        return _TEXT if kind == _HOLDER and name == "content" else _CLEAN

    def _stripped(self, value: nodes.Expr) -> int:
        kind = self._kind(value)
        if kind == _HOLDER:
            raise _DependsError
        self._whole |= kind == _TEXT
        return kind

    def _either(self, one: nodes.Expr, other: nodes.Expr) -> int:
        kinds = {self._kind(one), self._kind(other)}
        if _HOLDER in kinds and len(kinds) > 1:
            raise _DependsError
        return max(kinds)

    def _joined(self, *several: nodes.Expr) -> int:
        kind = max(map(self._kind, several))
        if kind == _HOLDER:
            raise _DependsError
        return kind
