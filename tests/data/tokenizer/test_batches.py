"""Dialogues are encoded in batches, and rendered only where their contents can change what the template prints."""

# ruff: noqa: E501 (templates keep their lines)

from __future__ import annotations

import random

import numpy as np
import pytest

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, TokenizedDialogue, Turn
from chatmill.data.preference import REJECTED
from chatmill.data.tokenizer.budget import TemplateRefusedError
from chatmill.data.tokenizer.template import MOST_CHARS, TEMPLATES, ChatTemplate
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe

CONTENTS = [
    "hi",
    "",
    " ",
    " a ",
    "x\n",
    "user",
    "今天天气\n不错",
    "<think>a</think>b",
    "tool",
    "{{ x }}",
    "q" * 300,
    "assistant\n",
]
LOOP = "{% for m in messages %}"
# Each of these looks into a content, or does with it what is not followed.
CURIOUS = {
    "comparison": LOOP + "{% if m.content == 'hi' %}!{% endif %}{{ m.content }}{% endfor %}",
    "membership": LOOP + "{% if '</think>' in m['content'] %}!{% endif %}{{ m.content }}{% endfor %}",
    "length": LOOP + "{{ m.content | length }}{{ m.content }}{% endfor %}",
    "slice": LOOP + "{{ m.content[:3] }}{% endfor %}",
    "method": LOOP + "{{ m.content.split('x')[0] }}{% endfor %}",
    "filter": LOOP + "{{ m.content | upper }}{% endfor %}",
    "whole message": LOOP + "{{ m | tojson }}{% endfor %}",
    "all messages": "{{ messages }}",
    "by name": "{% set k = 'content' %}" + LOOP + "{% if m[k] == 'hi' %}!{% endif %}{{ m.content }}{% endfor %}",
    "by number": "{% for i in range(messages | length) %}{{ messages[i].content | upper }}{% endfor %}",
    "name set later": LOOP + "{% if was == 'hi' %}!{% endif %}{% set was = m.content %}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(t='') %}"
    + LOOP
    + "{% if ns.t == 'hi' %}!{% endif %}{% set ns.t = m.content %}{% endfor %}",
    "alias": "{% set ns = namespace(t='') %}{% set b = ns %}"
    + LOOP
    + "{% set ns.t = m.content %}{{ b.t | upper }}{% endfor %}",
    "neighbour": LOOP + "{% if loop.previtem and loop.previtem.content == 'hi' %}!{% endif %}{{ m.content }}{% endfor %}",
    "macro": "{% macro f(x) %}{{ x | upper }}{% endmacro %}" + LOOP + "{{ f(m.content) }}{% endfor %}",
    "block": LOOP + "{% set t %}{{ m.content }}{% endset %}{{ t | upper }}{% endfor %}",
    "letters": LOOP + "{% for c in m.content %}{{ c }}-{% endfor %}{% endfor %}",
    "format": LOOP + "{{ '%s' % m.content }}{% endfor %}",
    "selection": "{% for m in messages | selectattr('content', 'equalto', 'hi') %}{{ m.content }}{% endfor %}",
    "items": LOOP + "{% for k, v in m.items() %}{{ v | upper }}{% endfor %}{% endfor %}",
}
PLAIN = {
    "emptiness": "{% for m in messages %}{{ m.role + ':' }}{% if m.content %}{{ m.content }}{% else %}-{% endif %}{% endfor %}",
    "stripped": "{% for m in messages %}{{ m.role ~ ': ' ~ m['content'].strip() }};{% endfor %}",
    "system first": "{% if messages[0].role == 'system' %}{% set s = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = none %}{% set rest = messages %}{% endif %}{{ s or 'none' }}|{% for m in rest %}{{ m.content }}|{% endfor %}",
    "held back": "{% set ns = namespace(t='') %}{% for m in messages if m.role != 'tool' %}{{ ns.t }}{% set ns.t = m.content + '\\n' %}"
    "{% endfor %}{{ ns.t | trim }}",
    "types": "{% for m in messages %}{% if m.content is string and m.tool_calls is not defined and not loop.last %}{{ m.content }},"
    "{% else %}{{ m.get('content') }}{% endif %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", CURIOUS)
def test_a_template_that_looks_at_contents_is_rendered_for_each_dialogue(name: str) -> None:
    assert not ChatTemplate(CURIOUS[name], {}).contents.opaque


@pytest.mark.parametrize("name", [*TEMPLATES, *PLAIN])
def test_where_contents_cannot_matter_they_stand_where_markers_stood(name: str) -> None:
    template, rng = ChatTemplate((TEMPLATES | PLAIN)[name], {"bos_token": "<s>", "eos_token": "</s>"}), random.Random(name)
    assert template.contents.opaque
    certain = 0
    for _ in range(150):
        roles = [*rng.choice(((), ("system",))), *("user", "assistant", "user", "tool", "assistant")[: rng.randint(1, 5)]]
        contents = [rng.choice(CONTENTS) for _ in roles]
        if template.contents.certain(contents):
            marked = template.render([{"role": r, "content": f"\ue000{i}\ue001"} for i, r in enumerate(roles)])
            for i, content in enumerate(contents):
                marked = marked.replace(f"\ue000{i}\ue001", content)
            assert marked == template.render([{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])
            certain += 1
    assert certain > 5
    assert not template.contents.certain(["x" * (MOST_CHARS + 1)])


def test_contents_that_are_stripped_must_have_nothing_to_strip() -> None:
    assert ChatTemplate(TEMPLATES["llama3"], {}).contents.certain(["hi", "there"])
    assert not ChatTemplate(TEMPLATES["llama3"], {}).contents.certain(["hi", "there "])
    assert not ChatTemplate(TEMPLATES["llama3"], {}).contents.certain(["hi", ""])
    assert ChatTemplate(TEMPLATES["chatml"], {}).contents.certain(["hi", "there "])


def dialogues() -> list[Conversation]:
    """Dialogues of all kinds, some of them refused."""
    rng = random.Random(3)
    found = []
    for n in range(40):
        turns = [Turn(("user", "assistant")[k % 2], rng.choice(CONTENTS)) for k in range(2 * rng.randint(1, 4))]
        found.append(Conversation(f"d{n}", tuple(turns), "s", f"o{n}"))
    silent = (Turn("user", "a"), Turn("assistant", "b", loss=False))
    better = (Turn("user", "a"), Turn("assistant", "b"))
    return [
        *found,
        Conversation("silent", silent, "s", "o"),
        Conversation("document", (Turn("assistant", "once upon"),), "s", "o", {"document": True}),
        Conversation("pair", better, "s", "o", {REJECTED: "c"}),
    ]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    """A small one."""
    return train_bpe(iter([*CONTENTS, "the prompt and the reply"]), 300)


def test_a_batch_gives_what_one_dialogue_at_a_time_gives(tokenizer: ChatTokenizer) -> None:
    found = tokenizer.encode_dialogues(dialogues())
    assert [c.uid for c, d in zip(dialogues(), found, strict=True) if isinstance(d, ConfigError)] == ["silent"]
    for conversation, dialogue in zip(dialogues(), found, strict=True):
        try:
            alone = tokenizer.encode_dialogue(conversation)
        except ConfigError as error:
            assert str(dialogue) == str(error)
            continue
        assert isinstance(dialogue, TokenizedDialogue) and dialogue.uid == alone.uid
        np.testing.assert_array_equal(dialogue.ids, alone.ids)
        np.testing.assert_array_equal(dialogue.loss_mask, alone.loss_mask)
        assert tokenizer.prove_mask(conversation) is None


def test_a_dialogue_is_rendered_only_where_its_contents_can_matter(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_), looking = dialogues(), train_bpe(iter(()), 300, template=TEMPLATES["chatml"] + "{{ messages[0].content[:0] }}")
    for each in (tokenizer, looking):
        each.encode_dialogue(first)  # the roles are known from now on

    def refuse(*_: object, **__: object) -> str:
        raise TemplateRefusedError("rendered")

    monkeypatch.setattr(ChatTemplate, "render", refuse)
    assert len(tokenizer.encode_dialogue(first).ids)
    with pytest.raises(TemplateRefusedError, match="rendered"):
        looking.encode_dialogue(first)
