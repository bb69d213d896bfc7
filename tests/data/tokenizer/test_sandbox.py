"""A chat template is a stranger's program: whatever it tries, it ends in a clear error or in its text."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import pytest

from chatmill.data.tokenizer import budget as template_budget
from chatmill.data.tokenizer.budget import Budget, TemplateRefusedError
from chatmill.data.tokenizer.replies import ReplyFinder
from chatmill.data.tokenizer.template import TEMPLATES, ChatTemplate

CHAT = [{"role": "user", "content": "some words"}, {"role": "assistant", "content": "more <words>"}]
DOUBLE = "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}"
TREE = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}"
HOSTILE: dict[str, tuple[str, str]] = {
    "a huge range": ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    "a huge range, written out": ("{% for i in range(1000000000000) %}{% endfor %}", "Range too big"),
    "loops in loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loop rounds"),
    "a loop condition": ("{% for i in range(99999) if range(99999) | list | length < 0 %}{% endfor %}", "steps"),
    "a macro without end": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    "macros of macros": (
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='abc') %}"
        "{% for i in range(60) %}{% set ns.x = f(ns.x) %}{% endfor %}", "characters of output",
    ),
    "blocks in blocks": (
        "{% set ns = namespace(x='abc') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}", "characters of output",
    ),
    "constants in a block": (
        "{% set y %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endset %}", "characters of output",
    ),
    "much output": ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "characters of output"),
    "repetition": ("{{ 'x' * 10000000000 }}", "not allowed"),
    "repetition the other way": ("{{ 10000000000 * [1] }}", "not allowed"),
    "powers": ("{{ 9 ** 9999 }}", "not allowed"),
    "squares": ("{% set ns = namespace(x=99) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "4,096 bits"),
    "old formatting": ("{{ '%99999999999d' % 1 }}", "width"),
    "old formatting by star": ("{{ '%*d' % (99999999, 1) }}", "width|number"),
    "old formatting, doubled": (DOUBLE + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}", "a text of|long layout"),
    "tabs": ("{{ 'x\t'.expandtabs(9999999999) }}", "at most"),
    "wide json": ("{% set a = 'x' * 99999 %}{{ range(999) | list | tojson(separators=(a, a)) }}", "at most"),
    "dicts from long lists": ("{% for i in range(9999) %}{% set a = dict.fromkeys(range(99999)) %}{% endfor %}", "steps"),
    "powers of powers": (DOUBLE.replace("'0123456789'", "9") + "{% set ns.x = ns.x ** 9 %}{% endfor %}", "4,096 bits"),
    "formatting by filter": ("{{ '%99999999999d' | format(1) }}", "width"),
    "formatting by star": ("{{ '%*d' | format(999999999, 1) }}", "width|number"),
    "formatting by method": ("{{ '{:99999999999}'.format(1) }}", "width"),
    "formatting by argument": ("{{ '{:{}}'.format(1, 99999) }}", "width"),
    "padding": ("{{ 'x'.ljust(10000000000) }}", "at most"),
    "centring": ("{{ 'x' | center(10000000000) }}", "at most"),
    "zeros": ("{{ '1'.zfill(9999999999) }}", "at most"),
    "indenting": ("{{ ('x\n' * 9000) | indent(99999) }}", "at most"),
    "indented json": ("{{ messages | tojson(indent=999999999) }}", "at most"),
    "batches": ("{{ [1] | batch(9999999999, 'x') | list }}", "at most"),
    "slices": ("{{ [1] | slice(9999999999) | list }}", "at most"),
    "doubling by plus": (DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}", "a text of"),
    "doubling by tilde": (DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "a text of"),
    "doubling by join": (DOUBLE + "{% set ns.x = [ns.x, ns.x] | join('-') %}{% endfor %}", "a text of"),
    "doubling by joining": (DOUBLE + "{% set ns.x = ns.x.join('abc') %}{% endfor %}", "a text of"),
    "doubling by replace": (DOUBLE + "{% set ns.x = ns.x | replace('0', ns.x) %}{% endfor %}", "a text of"),
    "doubling by replacing": (DOUBLE + "{% set ns.x = ns.x.replace('', ns.x) %}{% endfor %}", "a text of"),
    "doubling by format": (DOUBLE + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}", "a text of"),
    "doubling lists": (DOUBLE + "{% set ns.x = ns.x | list + ns.x | list %}{% endfor %}", "values in one list|steps"),
    "trees of lists": (TREE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}", "values in one list"),
    "trees of dicts": (TREE + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}", "values in one list"),
    "trees by call": (TREE + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}", "values in one list"),
    "trees of namespaces": (
        "".join(f"{{% set n{i} = namespace(a=n{i - 1}, b=n{i - 1}) %}}" for i in range(1, 60)) + "{{ n59 }}", "namespace",
    ),
    "a namespace as text": ("{% set n = namespace() %}{% set n.a = n %}{{ n ~ '' }}", "namespace"),
    "a namespace as string": ("{% set n = namespace() %}{{ n | string }}", "namespace"),
    "comparing lists": (
        "{% set a = range(99999) | list %}{% set b = range(99999) | list %}"
        "{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}", "steps",
    ),
    "searching": (
        "{% set a = 'ab' * 40000 %}{% for i in range(99999) %}{% if 'abc' in a %}{% endif %}{% endfor %}", "steps",
    ),
    "searching by test": (
        "{% set a = ('ab' * 40000) + ('ab' * 40000) %}{% for i in range(999) %}"
        "{% if range(99999) | map('string') | select('in', a) | list %}{% endif %}{% endfor %}", "steps",
    ),
    "cutting": ("{% set a = range(99999) | list %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}", "steps"),
    "sums of lists": ("{{ [[1], [2]] | sum(start=[]) }}", "numbers"),
    "fillers": ("{{ lipsum(n=100000) }}", "undefined"),
    "links": ("{{ 'x' | urlize }}", "does not compile"),
    "private names": ("{{ messages.__class__.__mro__ }}", "Security"),
    "changing what it is given": ("{{ messages.append(1) }}", "Security"),
    "class methods": ("{{ dict.mro() }}", "cannot be called|Security|undefined"),
    "a filter as a function": ("{{ 'x'.translate({}) }}", "is not there"),
    "raising": ("{{ raise_exception('only two roles') }}", "only two roles"),
    "raising at length": ("{{ raise_exception('x' * 90000) }}", "x{400,500}$"),
    "dividing by zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "bad grammar": ("{% if %}", "does not compile"),
    "deep grammar": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "does not compile"),
    "a long number": ("{{ " + "9" * 100_000 + " }}", "does not compile|4,096|bits"),
    "no loader": ("{% include 'x' %}", "loader"),
    "the budget itself": ("{% set chatmill_budget = '' %}{% for i in range(99999) %}{% endfor %}", "is taken"),
    "a long source": ("x" * 1_000_001, "at most"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error_that_says_what(name: str) -> None:
    source, reason = HOSTILE[name]
    with pytest.raises(TemplateRefusedError, match=reason):
        ChatTemplate(source, {}).render(CHAT)


def test_a_hostile_template_does_not_fill_the_memory() -> None:
    tracemalloc.start()
    try:
        for name in ("repetition", "padding", "doubling by plus", "doubling by replacing", "blocks in blocks"):
            with pytest.raises(TemplateRefusedError):
                ChatTemplate(HOSTILE[name][0], {}).render(CHAT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20


def test_the_same_template_spends_the_same_steps_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    kept: list[Budget] = []

    class Watched(Budget):
        __slots__ = ()

        def __init__(self) -> None:
            super().__init__()
            kept.append(self)

    monkeypatch.setattr("chatmill.data.tokenizer.sandbox.Budget", Watched)
    template = ChatTemplate(TEMPLATES["llama3"], {"bos_token": "<s>"})
    threads = [threading.Thread(target=template.render, args=(CHAT,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = [budget.steps for budget in kept]
    assert len(left) == 4 and len(set(left)) == 1 and left[0] < template_budget.MAX_STEPS


def test_processor_time_is_bounded_too() -> None:
    now = [0.0]
    budget = Budget(clock=lambda: now[0])
    budget.spend(5000)
    now[0] = template_budget.MAX_SECONDS + 1
    with pytest.raises(TemplateRefusedError, match="processor time"):
        budget.spend(5000)


def test_a_thousand_turns_and_long_contents_are_no_attack() -> None:
    chat = [{"role": ("user", "assistant")[i % 2], "content": "word" * 1000} for i in range(1000)]
    for name in TEMPLATES:
        template, ends = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}), ("<|im_end|>", "<|eot_id|>")
        found = ReplyFinder(template, ["</s>", *ends], ["</s>", *ends]).find(chat, range(1, 1000, 2))
        assert len(found.spans) == 500 and len(found.text) > 4_000_000


def python(source: str, **variables: Any) -> str:
    """The same template in jinja2 without limits."""
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    return environment.from_string(source).render(messages=CHAT, add_generation_prompt=False, **variables)


HONEST = (
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }} {{ m.content | upper }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.previtem.role ~ ':' ~ 3 ~ none }}{% endfor %}",
    "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s + m['role'][:2] %}"
    "{% endfor %}{{ ns.n }} {{ ns.s }} {{ messages[1:] | length }} {{ messages[::-1][0].role }}",
    "{% macro say(m, mark='>') -%}{{ mark }}{{ m.content | trim | e }}{%- endmacro %}{{ say(messages[0]) }}",
    "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}{{ messages[1].content }}{% endcall %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
    "{{ messages | map('length') | list }} {{ messages | rejectattr('role', 'in', ['user']) | list | length }}",
    "{{ messages[0].content.split(' ')[-1].strip().title() }} {{ 'a-b'.replace('-', '+') }} {{ '{0} {x}'.format(1, x='y') }}",
    "{{ '%s %d' | format('a', 3) }} {{ [1, 2, 3] | sum }} {{ [3, 1] | sort }} {{ {'b': 1, 'a': 2} | dictsort }}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{{ ['a'] + ['b'] }} {{ 2 * 'ab' }}",
    "{{ 'x' in ['x', 'y'] }}{{ 1 < 2 < 3 }}{{ messages[0].get('tool', 'no') }} {{ 'role' in messages[0] }} {{ 'abc'[1:] }}",
    "{{ messages[0].name is defined }} {{ '%05.1f' | format(2.5) }} {{ [1, [2]] == [1, [2]] }} {{ none is none }}",
    "{% set text %}<{{ messages[0].role }}>{% endset %}{{ text * 2 }}{% filter upper %}in{{ 1 }}{% endfilter %}",
    "{% for a in [1, 2] recursive %}{{ a }}{% if a == 2 %}{{ loop([1]) }}{% endif %}{% endfor %}{{ ', '.join(['x', 'y']) }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner(',') %}{{ j() }}{{ j() }}{{ 7 % 4 }}",
    "{% autoescape true %}{{ '<b>' }}{{ '<i>' | safe }}<u>{% endautoescape %}{{ messages | groupby('role') | first | first }}",
    "{%- if not messages[5] is defined -%}  short  {%- endif %}\n{{ 'é' | urlencode }} {{ 3.7 | int }} {{ '5' | int + 1 }}",
    "{{ (1, 2) }} {{ -3 | abs }} {{ 'ab' | list }} {{ 'a\nb' | indent(2) }} {{ dict(a=1).a }} {{ 'x' ~ 1.5 ~ true }}",
)


@pytest.mark.parametrize("source", HONEST)
def test_what_honest_templates_use_gives_what_plain_jinja_gives(source: str) -> None:
    assert ChatTemplate(source, {}).render(CHAT) == python(source)
