"""A jinja2 sandbox with limits: hostile templates end in TemplateRefusedError instead of a hang or exhausted memory.

    sandbox = Sandbox();  template = sandbox.compile_template(source);  text = sandbox.render(template, {"messages": [...]})

Nothing outside can stop Python code that runs in the same thread, so the limits are counted from inside. A compiled template is
rewritten so that every loop iteration, call, filter, test, sum, comparison, literal and piece of output spends from one
budget: a step, and more with the size of what it works on. Operations with large results (padding, repeating, replacing,
joining, formatting) are measured before they run; what chat templates do not need (powers, `lipsum`, `urlize`) is removed. The
budget counts steps, so the same template fails at the same place on every machine. In addition the clock of the thread
(processor time, not the time of day) limits what steps do not show.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from .budget import (
    MAX_ARGUMENT,
    MAX_SOURCE_CHARS,
    MAX_VALUE_CHARS,
    Budget,
    TemplateRefusedError,
)

BUDGET = "chatmill_budget"
FIXED_DAY = datetime(2024, 1, 1)  # "now" unless a moment is set: today's date would make two builds of the same data differ

_METHODS = {
    str: "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii isdecimal "
    "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix "
    "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
    "zfill",
    dict: "copy get items keys values",
    list: "copy count index",
    tuple: "count index",
    int: "bit_length is_integer",
    float: "is_integer",
}
_ALLOWED_METHODS = {kind: frozenset(names.split()) for kind, names in _METHODS.items()}
_DROPPED_FILTERS = ("filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_LAZY_FILTERS = frozenset(("map", "select", "selectattr", "reject", "rejectattr"))
_SCOPES = ("_loop_vars", "_block_vars")  # jinja2's own arguments to every call inside a loop or block
_NUMBERS_ARE_VALUES = frozenset(("get", "default", "d", "index", "count"))
_WIDE_FORMAT = re.compile(r":[^{}:]*(?:\d{4}|\{)|%[^a-zA-Z%]*(?:\d{4}|\*)")


class _GenerationTag(Extension):
    """{% generation %} … {% endgeneration %} of newer templates: rendered as plain text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        # What is set inside is not seen outside.
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Meter(NodeTransformer):
    """Wraps costly nodes in filters that spend."""

    def __init__(self, environment: Sandbox) -> None:
        self.environment = environment

    def get_visitor(self, node: nodes.Node) -> Any:
        """The method for a kind of node, if it costs."""
        return getattr(self, f"meter_{type(node).__name__.lower()}", None)

    def _through(self, node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self.environment)

    def meter_output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        plain = [isinstance(child, nodes.TemplateData | nodes.Const) for child in node.nodes]
        chars = sum(len(str(child.as_const())) for child, is_plain in zip(node.nodes, plain, strict=True) if is_plain)
        node.nodes = [
            child if is_plain else self._through(child, "_write") for child, is_plain in zip(node.nodes, plain, strict=True)
        ]
        if chars:
            const = nodes.Const(chars, lineno=node.lineno, environment=self.environment)
            node.nodes.append(self._through(const, "_wrote"))
        return node

    def meter_for(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        budget = nodes.Name(BUDGET, "load", lineno=node.lineno, environment=self.environment)
        node.body.insert(0, nodes.Output([budget], lineno=node.lineno, environment=self.environment))
        if node.test is not None:
            node.test = nodes.And(budget, node.test, lineno=node.lineno, environment=self.environment)
        return node

    def meter_compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        for operand in node.ops:
            if operand.op in ("in", "notin") or not (_is_constant(node.expr) or _is_constant(operand.expr)):
                operand.expr = operand.expr if _is_constant(operand.expr) else self._through(operand.expr, "_weigh")
        return node

    def meter_concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(nodes.List(node.nodes, lineno=node.lineno, environment=self.environment), "_concat")

    def meter_getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return self._through(node, "_sliced") if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node

    def _literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or _is_constant(node):
            return node
        return self._through(node, "_weigh")

    meter_list = meter_tuple = meter_dict = _literal


def _is_constant(node: nodes.Expr) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(_is_constant(item) for item in node.items)
    return isinstance(node, nodes.Const)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2 as chat templates need it, metered."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        self._local = threading.local()
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _tojson
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        tests: Any = self.tests
        self.tests = {name: self._metered_test(function) for name, function in tests.items()}
        for inner in (self._write, self._wrote, self._weigh, self._concat, self._sliced):
            self.filters[inner.__name__] = inner
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.moment = FIXED_DAY
        self._strftime_now: Callable[[str], str] = lambda layout: self.moment.strftime(layout)
        self.globals["strftime_now"] = self._strftime_now

    def compile_template(self, source: str) -> Template:
        """The template, metered. Raises TemplateRefusedError."""
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateRefusedError(f"chat template: {len(source):,} characters; at most {MAX_SOURCE_CHARS:,} are read")
        if BUDGET in source:
            raise TemplateRefusedError(f"chat template: does not compile (the name {BUDGET} is taken)")
        try:
            return self.from_string(_Meter(self).visit(self.parse(source)))
        except (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
            raise TemplateRefusedError(f"chat template: does not compile ({str(error)[:500]})") from error

    def variables_of(self, source: str) -> frozenset[str]:
        """Names that a template reads and does not set, the sandbox's own functions not among them."""
        return frozenset(meta.find_undeclared_variables(self.parse(source))) - frozenset(self.globals)

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """The text. Raises TemplateRefusedError."""
        self._local.budget = budget = Budget()
        try:
            return "".join(template.generate({**variables, BUDGET: budget}))
        except TemplateRefusedError:
            raise
        except Exception as error:  # an untrusted program can fail in any way
            raise TemplateRefusedError(f"chat template: {type(error).__name__}: {str(error)[:500]}") from error
        finally:
            self._local.budget = None

    @property
    def _budget(self) -> Budget:
        budget: Budget | None = getattr(self._local, "budget", None)
        if budget is None:  # asked while compiling, to fold constants
            raise TemplateRefusedError("chat template: nothing is computed while compiling")
        return budget

    # -- operators and calls

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+ * % **`, measured beforehand."""
        budget = self._budget
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                _fits(len(left) + len(right))
                budget.spend(1 + ((len(left) + len(right)) >> 8))
                return left + right
        elif operator == "*" and not numbers:
            sizes = [value if isinstance(value, int) else len(value) for value in (left, right)]
            if max(sizes) > 0 and sizes[0] * sizes[1] > MAX_ARGUMENT:
                raise TemplateRefusedError(
                    f"chat template: operator '*' to more than {MAX_ARGUMENT:,} characters is not allowed"
                )
        elif operator == "%" and isinstance(left, str):
            self._measure("format", left, right if isinstance(right, tuple) else (right,), {})
        elif operator == "**" and numbers and isinstance(left, int) and left.bit_length() * abs(right) > 4096:
            raise TemplateRefusedError("chat template: operator '**' to more than 4,096 bits is not allowed")
        elif not numbers:
            raise TemplateRefusedError(f"chat template: operator {operator!r} on {type(left).__name__} is not allowed")
        budget.weigh(left)
        budget.weigh(right)
        result = super().call_binop(context, operator, left, right)
        budget.weigh(result)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, PYI063 (jinja2's own names)
        """A method of a text, list or dict, a macro, or one of jinja2's helpers."""
        budget, owner = __self._budget, getattr(__obj, "__self__", None)
        budget.spend()
        if hasattr(__obj, "__wrapped__"):  # str.format in the sandbox
            owner = __obj.__wrapped__.__self__
        kind = next((kind for kind in _ALLOWED_METHODS if isinstance(owner, kind) and not isinstance(owner, bool)), None)
        plain = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        if kind is not None and not isinstance(__obj, Macro | type):
            name = __obj.__name__
            if name not in _ALLOWED_METHODS[kind]:
                raise TemplateRefusedError(f"chat template: the method {kind.__name__}.{name} is not there")
            if name == "join" and args:  # the filter has it the other way round
                parts = list(args[0]) if isinstance(args[0], Iterator) else args[0]
                __self._measure(name, parts, (owner,), {})
                args = (parts,)
            else:
                args = __self._measure(name, owner, args, plain)
        elif __obj is _raise_exception or __obj is __self._strftime_now or (owner is dict and __obj.__name__ == "fromkeys"):
            args = __self._measure("", None, args, plain)
        elif not isinstance(__obj, (Macro, LoopContext, BlockReference, Joiner, Undefined)):
            known = any(__obj is helper for helper in (safe_range, dict, Namespace, Cycler, Joiner))
            if not known and not isinstance(owner, (LoopContext, Cycler)):
                raise TemplateRefusedError(f"chat template: a {type(__obj).__name__} cannot be called")
        result = super().call(__context, __obj, *args, **kwargs)
        if not isinstance(result, Namespace | Cycler | Joiner | Iterator):
            budget.weigh(result)
        return result

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 0 if _PassArg.from_obj(function) is None else 1

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            budget = self._budget
            value = args[first]
            if isinstance(value, Iterator) and name not in _LAZY_FILTERS:
                value = list(value)
            budget.weigh(value)
            args = (*args[:first], value, *self._measure(name, value, args[first + 1 :], kwargs))
            result = function(*args, **kwargs)
            if isinstance(result, Iterator) and name not in _LAZY_FILTERS:
                result = list(result)
            if not isinstance(result, Iterator):
                budget.weigh(result)
            return result

        return filtered

    def _metered_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 0 if _PassArg.from_obj(function) is None else 1

        @functools.wraps(function)
        def tested(*args: Any, **kwargs: Any) -> Any:
            budget = self._budget
            budget.spend()
            for other in args[first + 1 :]:  # tests of one value look only at its kind
                budget.weigh(other)
                budget.weigh(args[first])
            return function(*args, **kwargs)

        return tested

    def _measure(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments, with generators made lists; refused if the result would be too large."""
        args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
        given = [*args, *kwargs.values()]
        for argument in given:
            self._budget.weigh(argument)
            if isinstance(argument, int) and abs(argument) > MAX_ARGUMENT and name not in _NUMBERS_ARE_VALUES:
                raise TemplateRefusedError(f"chat template: {name}() with the number {argument}; at most {MAX_ARGUMENT:,}")
        texts = [len(argument) for argument in given if isinstance(argument, str)]
        if name == "replace" and isinstance(value, str) and len(given) >= 2 and all(isinstance(a, str) for a in given[:2]):
            _fits(len(value) + value.count(given[0]) * len(given[1]))
        elif name == "join":
            glue = max(texts, default=0)
            _fits(sum((len(part) if isinstance(part, str) else 32 * self._budget.deep(part)) + glue for part in value))
        elif name == "indent" and isinstance(value, str):
            width = max([4, *texts, *(a for a in given if isinstance(a, int))])
            _fits(len(value) + (value.count("\n") + 1) * width)
        elif name == "expandtabs" and isinstance(value, str):
            _fits(len(value) + value.count("\t") * max([8, *(a for a in given if isinstance(a, int))]))
        elif name == "tojson":
            width = max([0, *(a for a in given if isinstance(a, int)), *texts, *(self._budget.deep(a) * 32 for a in given)])
            _fits(self._budget.deep(value) * (1 + width))
        elif name in ("format", "format_map"):
            if not isinstance(value, str) or len(value) > 4000 or _WIDE_FORMAT.search(value):
                raise TemplateRefusedError("chat template: format() with a computed width, one above 999, or a long layout")
            most = max([0, *(32 * self._budget.deep(a) for a in given)])
            _fits(len(value) + (value.count("{") + value.count("%")) * (1000 + most))
        elif name == "sum" and any(not isinstance(a, int | float | str) for a in given):
            raise TemplateRefusedError("chat template: sum() adds numbers alone")
        return args

    # -- what the rewritten template calls

    def _write(self, value: Any) -> Any:
        if isinstance(value, str):
            self._budget.write(len(value))
        else:
            self._budget.write(32 * self._budget.deep(value))
        return value

    def _wrote(self, chars: int) -> str:
        self._budget.write(chars)
        return ""

    def _weigh(self, value: Any) -> Any:
        self._budget.weigh(value)
        return value

    def _sliced(self, value: Any) -> Any:
        self._budget.spend(1 + (len(value) >> (8 if isinstance(value, str) else 5)))
        return value

    def _concat(self, parts: list[Any]) -> str:
        size = sum(len(part) if isinstance(part, str) else 32 * self._budget.deep(part) for part in parts)
        _fits(size)
        self._budget.spend(1 + (size >> 8))
        return "".join(map(str, parts))


def _fits(chars: int) -> None:
    if chars > MAX_VALUE_CHARS:
        raise TemplateRefusedError(f"chat template: a text of {chars:,} characters; at most {MAX_VALUE_CHARS:,} are made")


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers, which does not escape HTML as jinja2 does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
