"""Templates of the wild: what Qwen3, Gemma 4, Llama 3.1 and others use is rendered byte for byte as transformers renders it."""
# ruff: noqa: E501 (templates keep their lines)

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from chatmill.data.conversation import Conversation, Turn
from chatmill.data.tokenizer.template import ChatTemplate
from chatmill.data.tokenizer.tokenizer import train_bpe

# Written for this test, with the constructs of the published templates.
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
GEMMA4 = """{%- macro format_argument(argument, escape_keys=True) -%}
    {%- if argument is string -%}{{- '<|q|>' + argument + '<|q|>' -}}
    {%- elif argument is boolean -%}{{- 'true' if argument else 'false' -}}
    {%- elif argument is mapping -%}{{- '{' -}}{%- set ns = namespace(found_first=false) -%}
        {%- for key, value in argument | dictsort -%}{%- if ns.found_first %},{% endif -%}{%- set ns.found_first = true -%}
            {{- key -}}:{{- format_argument(value, escape_keys=escape_keys) -}}{%- endfor -%}{{- '}' -}}
    {%- elif argument is sequence -%}{{- '[' -}}{%- for item in argument -%}{{- format_argument(item) -}}{%- if not loop.last %},{% endif -%}{%- endfor -%}{{- ']' -}}
    {%- else -%}{{- argument -}}{%- endif -%}
{%- endmacro -%}
{%- macro strip_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- if '<|channel>' in part -%}{%- set ns.result = ns.result + part.split('<|channel>')[0] -%}
        {%- else -%}{%- set ns.result = ns.result + part -%}{%- endif -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{%- set ns = namespace(prev_message_type=None, last=-1) -%}
{%- set loop_messages = messages -%}
{{- bos_token -}}
{%- if (enable_thinking is defined and enable_thinking) or tools or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\\n' -}}{{- messages[0]['content'] | trim -}}{%- set loop_messages = messages[1:] -%}{{- '<turn|>\\n' -}}
{%- endif %}
{%- for i in range(loop_messages | length) -%}{%- if loop_messages[i]['role'] == 'user' -%}{%- set ns.last = i -%}{%- endif -%}{%- endfor -%}
{%- for message in loop_messages -%}
    {%- if message['role'] != 'tool' -%}
    {%- set ns.prev_message_type = None -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- set prev_nt = namespace(role=None, found=false) -%}
    {%- if loop.index0 > 0 -%}
        {%- for j in range(loop.index0 - 1, -1, -1) -%}
            {%- if not prev_nt.found -%}{%- if loop_messages[j]['role'] != 'tool' -%}{%- set prev_nt.role = loop_messages[j]['role'] -%}{%- set prev_nt.found = true -%}{%- endif -%}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if not (role == 'model' and prev_nt.role == 'assistant') -%}{{- '<|turn>' + role + '\\n' -}}{%- endif -%}
    {%- if message.get('reasoning') and loop.index0 > ns.last -%}{{- '<|channel>thought\\n' + message['reasoning'] + '\\n<channel|>' -}}{%- endif -%}
    {%- if message.get('tool_calls') -%}{%- for tc in message['tool_calls'] -%}{{- '<|tool_call>call:' + tc['function']['name'] + '{' -}}{{- format_argument(tc['function']['arguments']) -}}{{- '}<tool_call|>' -}}{%- endfor -%}{%- endif -%}
    {%- set captured -%}
    {%- if message['content'] is string -%}
        {%- if role == 'model' -%}{{- strip_thinking(message['content']) -}}{%- else -%}{{- message['content'] | trim -}}{%- endif -%}
    {%- elif message['content'] is sequence -%}
        {%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{- item['text'] | trim -}}{%- endif -%}{%- endfor -%}
    {%- endif -%}
    {%- endset -%}
    {{- captured -}}{%- set has_content = captured | trim | length > 0 -%}
    {%- if loop.nextitem is defined and loop.nextitem.role == 'x' -%}{{- 'x' -}}{%- endif -%}
    {{- '<turn|>\\n' if has_content else '' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}"""
SMALL = {
    "llama31": "{{- bos_token }}{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = '26 Jul 2024' %}{%- else %}{%- set date_string = 'x' %}{%- endif %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}{{ date_string }}{%- if tools is not none %}{{- 'TOOLS' }}{%- endif %}{{- system_message }}{%- for m in messages %}{%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}{{- m.role + m.content | trim }}{%- endif %}{%- endfor %}",
    "toolsnone": "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ bos_token is defined }}{{ pad_token is defined }}",
    "tojson": "{{ messages | tojson(indent=2, separators=(',', ': '), sort_keys=true) }}{{ messages | tojson(ensure_ascii=true) }}{{ messages|tojson(ensure_ascii=False) }}{{ {'b':1,'a':'é'}|tojson(sort_keys=True) }}",
    "generation": "{% for m in messages %}{% if m.role=='assistant' %}{% set x = 1 %}{% generation %}{{ m.content }}{% set x = 2 %}{% endgeneration %}{{ x }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "methods": "{{ 'a%s' % 'b' }}{{ '%s-%d' % ('x', 3) }}{{ 2 ** 10 }}",
    "strs": "{{ messages[0].content.rsplit(' ', 1)[0] }}{{ 'AbC'.swapcase() }}{{ 'x'.join(['a','b']) }}{{ 'a,b'.partition(',') }}{{ 'ab'.removeprefix('a') }}{{ 'a\tb'.expandtabs(4) }}{{ 'ab'.isidentifier() }}",
    "ns": "{% set ns = namespace(a=[], d={}) %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}{% set ns.d = dict(ns.d, **{m.role: m.content}) %}{% endfor %}{{ ns.a }}{{ ns.d }}{{ ns.d.items() | list }}",
    "items": "{% for k, v in messages[0] | items %}{{ k }}{{ v }}{% endfor %}{% for k,v in messages[0].items()|list|sort %}{{ k }}{% endfor %}{{ messages[0].keys() | list }}{{ messages | map(attribute='role') | unique | list }}",
    "loopx": "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else 'none' }}{{ loop.nextitem.role if loop.nextitem }}{{ loop.changed(m.role) }}{{ loop.cycle('a','b') }}{{ loop.revindex0 }}{{ loop.depth }}{% if loop.index > 3 %}{% break %}{% endif %}{% else %}none{% endfor %}",
    "slices": "{{ messages[::-1] | length }}{{ messages[-1:][0].role }}{{ messages[1::2] | map(attribute='role') | list }}{{ 'abcdef'[::-1] }}{{ messages | reverse | map(attribute='role') | join }}{{ (messages | last).content }}{{ messages[:-1] | length }}",
    "recursive": "{% macro tree(x) %}{% if x is mapping %}{{ '{' }}{% for k, v in x.items() %}{{ k }}={{ tree(v) }}{{ ', ' if not loop.last }}{% endfor %}{{ '}' }}{% elif x is iterable and x is not string %}[{% for v in x %}{{ tree(v) }}{% endfor %}]{% else %}{{ x }}{% endif %}{% endmacro %}{{ tree({'a': [1, {'b': none}], 'c': messages}) }}",
    "caller": "{% macro w(t) %}<{{ t }}>{{ caller(1) }}</{{ t }}>{% endmacro %}{% call(n) w('a') %}{{ n }}{% endcall %}{{ w.name }}{{ varargs is defined }}{% macro va() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ va(1, 2, z=3) }}",
    "intdiv": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 3 }}{{ -7 % 3 }}{{ 1.5 * 2 }}{{ 3 - 1 }}{{ +2 }}{{ not true }}{{ [1,2] + [3] }}{{ (1,) + (2,) }}{{ 'ab' * 2 }}",
    "tests": "{{ 1 is number }}{{ 1 is integer }}{{ 1.0 is float }}{{ [] is sequence }}{{ 'a' is string }}{{ none is none }}{{ x is undefined }}{{ true is true }}{{ true is boolean }}{{ 'a' is in 'abc' }}{{ 4 is divisibleby 2 }}{{ 'A' is upper }}{{ 1 is eq 1 }}{{ 'tojson' is filter }}{{ messages is iterable }}{{ raise_exception is callable }}",
    "filters": "{{ ['b','a'] | sort(reverse=true) | join('-') }}{{ messages | selectattr('role','equalto','user') | list | length }}{{ 'a' | default('x') }}{{ none | default('x', true) }}{{ '' | d('y', boolean=True) }}{{ [1,2,3] | batch(2) | list }}{{ 'x y' | replace(' ', '_') | upper }}{{ [3,1] | max }}{{ 'abc' | first }}{{ 3.14159 | round(2) }}{{ '<b>' | escape }}{{ 'hello world' | capitalize }}{{ 'x' | string }}{{ 'a b c' | wordcount }}{{ [[1,2],[3]] | sum(start=[]) if false else 1 }}{{ 'long text here' | truncate(9) }}{{ ['x'] | tojson | safe }}{{ 'a' | indent(4, true) }}{{ 'x' | attr('upper') is defined }}",
    "cond": "{{ 'a' if messages else 'b' }}{{ messages[99] is defined }}{{ messages[0].get('x') or 'none' }}",
    "setblock": "{%- set sys -%}{{ messages[0].content }}{%- endset -%}{{ sys.strip() }}{{ sys | length }}{{ sys is string }}{% if sys.startswith('s') %}S{% endif %}{{ sys + 'x' }}",
    "with": "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{% filter upper %}x{% endfilter %}{# c #}{% raw %}{{ x }}{% endraw %}",
    "undef": "{{ messages[0].nothing }}{{ undefinedname }}{% if undefinedname %}a{% endif %}{% for q in undefinedname %}x{% endfor %}{{ undefinedname | length }}",
    "chained": "{% set content = messages[1].content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ content | trim('\n') }}{{ content.strip('\n ') }}{{ content.splitlines() }}{{ content.title() }}{{ content.format() }}{{ '{}'.format(content) }}",
    "fromkeys": "{{ dict.fromkeys(['a','b'], 1) }}{{ dict(a=1) }}{{ dict([('x', 2)]) }}",
    "rangeneg": "{% for i in range(3, -1, -1) %}{{ i }}{% endfor %}{{ range(5)[2] }}{{ range(4) | list }}{{ range(3) | length }}{{ 2 in range(4) }}{% set r = range(messages|length) %}{% for i in r %}{{ messages[i].role }}{% endfor %}",
}
TEMPLATES = {"Qwen3's": QWEN3, "Gemma 4's": GEMMA4, **SMALL}
CHATS: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": "some words"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nmore <words>"},
        {"role": "user", "content": " 天气 "},
        {"role": "assistant", "content": "ok\n"},
    ],
    [
        {"role": "system", "content": "sys"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<|channel>t<channel|>a"},
        {"role": "user", "content": "b"},
    ],
    [{"role": "user", "content": "q"}],
    [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"a": [1, True, None, "é"], "b": {"c": 1.5}}}}
            ],
        },
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "x", "reasoning": "r"},
    ],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_what_it_gives_in_transformers(name: str) -> None:
    rendered = 0
    for chat in CHATS:
        for opens in (False, True):
            try:
                ((want,), _) = render_jinja_template(
                    [chat], chat_template=TEMPLATES[name], add_generation_prompt=opens, **SPECIAL
                )
            except Exception:  # a template that cannot take this chat
                continue
            rendered += 1
            assert ChatTemplate(TEMPLATES[name], SPECIAL | {"pad_token": None}).render(chat, opens) == want
    assert rendered


DATED = (
    "{{ strftime_now('%Y-%m-%d') }}|" + "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}assistant: "
)


def test_chat_gets_todays_date_and_data_gets_a_fixed_one() -> None:
    tokenizer = train_bpe(iter(["assistant user 2024"]), 300, template=DATED)
    ask = [{"role": "user", "content": "hi"}]
    talk = Conversation("u", (Turn("user", "hi"), Turn("assistant", "yes")), "s", "o")
    built = tokenizer.encode_dialogue(talk).ids.tolist()
    assert tokenizer.decode(tokenizer.prompt_ids(ask)).startswith("2024-01-01|") and tokenizer.decode(built).startswith(
        "2024-01-01|"
    )
    before = datetime.now().date()
    tokenizer.use_todays_date()
    said = tokenizer.decode(tokenizer.prompt_ids(ask))
    found = re.match(r"(.*?)\|user: hi<\|im_end\|>", said)
    assert found and before.isoformat() <= found[1] <= datetime.now().date().isoformat()
    days = iter((datetime(2031, 5, 6), datetime(2031, 5, 7)))
    tokenizer.template.clock = lambda: next(days)
    assert [tokenizer.decode(tokenizer.prompt_ids(ask))[:10] for _ in range(2)] == ["2031-05-06", "2031-05-07"]
