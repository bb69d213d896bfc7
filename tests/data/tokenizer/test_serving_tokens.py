"""Each reply is learned behind the prompt that a server sends for it: with tools, calls, thoughts and template arguments."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from transformers.utils.chat_template_utils import render_jinja_template

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, Turn, dump_line, load_line
from chatmill.data.importers.datasets.openai_messages import dialogue
from chatmill.data.ledger import Ledger
from chatmill.data.pipeline.stages import _note_unused
from chatmill.data.recipe import PairSection
from chatmill.data.report.funnel import print_samples
from chatmill.data.samples.pair import make_samples
from chatmill.data.samples.per_reply import in_pieces
from chatmill.data.tokenizer.calls.arguments import with_arguments
from chatmill.data.tokenizer.template import TEMPLATES
from chatmill.data.tokenizer.tokenizer import ChatTokenizer

from .published import SHAPES, WEATHER, check, published, tokenizer_for
from .test_replies import HARMONY, OPENS_THOUGHTS
from .test_templates_of_the_wild import QWEN3

# Calls as DeepSeek writes them: arguments as a text, tokens around them, and a thought that the prompt opens.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% elif m.tool_calls %}<｜Assistant｜>{{ m.content or '' }}{% for c in m.tool_calls %}<｜tool▁call▁begin｜>"
    "{{ c.function.name + '\\n' + c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}<｜end▁of▁sentence｜>"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>\\n' }}{% endif %}"
)
# One call a message, nine letters and digits of an id, and results beside it, as Mistral's templates have them.
MISTRAL = (
    "{{ bos_token }}{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'system' %}"
    "{% if tools and m == last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}{{ m.tool_call_id }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{{ ', ' if not loop.last }}"
    "{% endfor %}]{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
COVERING = {"Qwen3": QWEN3, "DeepSeek": DEEPSEEK, "Mistral": MISTRAL, "llama3": TEMPLATES["llama3"], "harmony": HARMONY}
ALL = sum(len([m for m in shape if m["role"] == "assistant" and m.get("weight") != 0]) for shape in SHAPES.values())


@pytest.mark.parametrize("name", COVERING)
def test_the_prompt_of_each_reply_is_that_of_transformers_byte_for_byte(name: str) -> None:
    tokenizer, found = tokenizer_for(COVERING[name]), Counter[str]()
    for shape in SHAPES:
        found += check(COVERING[name], shape, tokenizer)
    # Only Mistral's form has no words beside a call.
    assert found == ({"kept": ALL} if name != "Mistral" else {"kept": ALL - 1, "refused: " + LOST: 1})


LOST = "chat template: it loses part of a reply that calls a tool"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", published() or ["none"])
def test_every_published_template_sends_what_is_learned(name: str) -> None:
    templates = published()
    if not templates:
        pytest.skip("no published templates here: set CHATMILL_TEMPLATES, or pip install --no-deps trl")
    try:
        tokenizer = tokenizer_for(templates[name])
    except ConfigError:
        pytest.skip("takes no text")
    total = sum((check(templates[name], shape, tokenizer) for shape in SHAPES), Counter[str]())
    assert total.total() == ALL


def sample_of(shape: str, tools: bool = True, **pair: Any) -> Conversation:
    turns, meta = dialogue({"messages": SHAPES[shape]} | ({"tools": [WEATHER]} if tools else {}), "x", Ledger())
    (sample,) = make_samples(Conversation("u" * 32, tuple(turns), "s", "o", meta), PairSection(**pair), Ledger())
    return load_line(dump_line(sample))


def learned(tokenizer: ChatTokenizer, sample: Conversation) -> list[str]:
    found = []
    for piece in in_pieces(sample, tokenizer):
        made = tokenizer.encode_dialogue(piece)
        assert tokenizer.prove_mask(piece) is None
        found.append(tokenizer.decode(made.ids[made.loss_mask].tolist()))
    return found


def test_calls_and_thoughts_are_learned_and_results_are_not() -> None:
    tokenizer = tokenizer_for(QWEN3)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call><|im_end|>'
    assert learned(tokenizer, sample_of("call")) == [
        f"<think>\n\n</think>\n\n{call}", "<think>\n\n</think>\n\nIt rains.<|im_end|>",
    ]  # fmt: skip
    steps = learned(tokenizer, sample_of("steps with thoughts"))
    assert [text.split("\n")[1] for text in steps] == ["look first", "look again", "it is cooler", "sure"]
    assert not any("rain" in text or "hot" in text for text in steps)


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ("learn", "<think>\nseventeen by three\n</think>\n\nIt is 51.<|im_end|>"),
        ("read", "It is 51.<|im_end|>"),
        ("drop", "<think>\n\n</think>\n\nIt is 51.<|im_end|>"),
    ],
)
def test_thoughts_are_learned_read_or_dropped_as_the_recipe_says(thinking: str, expected: str) -> None:
    tokenizer = tokenizer_for(QWEN3)
    assert learned(tokenizer, sample_of("thought", thinking=thinking)) == [expected]
    (inside,) = set(learned(tokenizer, sample_of("thought in the text", thinking=thinking))[:1])
    assert ("thirds" in inside) is (thinking == "learn") and inside.endswith("It is 51.<|im_end|>")
    read = tokenizer.decode(tokenizer.encode_dialogue(sample_of("thought", thinking=thinking)).ids.tolist())
    assert ("seventeen" in read) is (thinking != "drop")


def test_a_thought_that_the_prompt_opens_is_learned_from_its_field() -> None:
    sample = sample_of("thought", tools=False)
    assert learned(tokenizer_for(OPENS_THOUGHTS), sample) == ["seventeen by three\n</think>\n\nIt is 51.<|eos|>"]


def test_arguments_as_a_text_are_arguments_as_an_object() -> None:
    messages = json.loads(json.dumps(SHAPES["call"]))
    messages[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Köln", "days": 2}'
    turns, _ = dialogue({"messages": messages}, "x", Ledger())
    assert turns == list(sample_of("call").turns) and turns[1].call_ids == ("call00001",) and turns[2].answers == "call00001"


def test_what_a_template_cannot_print_is_counted() -> None:
    plain, ledger = tokenizer_for(TEMPLATES["chatml"]), Ledger("samples")
    for shape in ("call", "thought"):
        _note_unused(sample_of(shape, tools=shape == "call"), plain, ledger)
    assert ledger.changed == {
        "declarations of tools kept, not in the prompt: the chat template does not print them": 1,
        "call of a tool learned as a line of JSON: the chat template has no form for it": 1,
        "thought beside a learned reply kept, not learned: the chat template does not print it": 1,
    }
    ledger, thinker = Ledger("samples"), tokenizer_for(QWEN3)
    for shape in SHAPES:
        for piece in in_pieces(sample_of(shape), thinker):
            _note_unused(piece, thinker, ledger)
    assert not ledger.changed


def test_the_proof_finds_a_call_that_is_cut_and_a_result_that_is_learned() -> None:
    tokenizer, sample = tokenizer_for(QWEN3), sample_of("call")
    first, second = in_pieces(sample, tokenizer)
    right = ChatTokenizer.encode_dialogue
    for piece, changed in ((first, slice(-3, -1)), (second, slice(300, 310))):
        made = right(tokenizer, piece)
        mask = made.loss_mask.copy()
        mask[changed] = ~mask[changed]
        wrong = replace(made, loss_mask=mask)
        tokenizer.encode_dialogue = lambda conversation, wrong=wrong: wrong  # type: ignore[method-assign, misc]
        assert tokenizer.prove_mask(piece) is not None


def test_template_arguments_are_the_defaults_that_a_request_may_change(tmp_path: Any) -> None:
    source = with_arguments(QWEN3, {"enable_thinking": False})
    messages = SHAPES["system"][:2]
    shown = {}
    for given in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        ((want,), _) = render_jinja_template(
            [messages], chat_template=QWEN3, add_generation_prompt=True, **({"enable_thinking": False} | given)
        )
        ((theirs,), _) = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **given)
        tokenizer = tokenizer_for(source)
        tokenizer.save(tmp_path)  # what a run, a checkpoint and an export hold
        ours = ChatTokenizer.load(tmp_path)
        assert ours.decode(ours.prompt_ids(messages, given)) == theirs == want
        shown[str(given)] = want
    assert len(set(shown.values())) == 2
    with pytest.raises(ConfigError, match=r"template_arguments: .*'enable_thought': it reads.*enable_thinking"):
        with_arguments(QWEN3, {"enable_thought": False})


def test_a_value_of_any_kind_is_written_as_jinja_reads_it() -> None:
    values: dict[str, Any] = {"a": 'say "hi"\n', "b": [1, 2.5, None], "c": {"k": True}, "d": "é😀"}
    source = "{{ a }}{{ b | tojson }}{{ c | tojson }}{{ d }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ((text,), _) = render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=with_arguments(source, values))
    assert text == 'say "hi"\n[1, 2.5, null]{"k": true}é😀x'


def test_a_turn_with_ids_and_thoughts_survives_the_shards() -> None:
    turns = (
        Turn("user", "q"),
        Turn("assistant", '{"name": "f", "arguments": {}}', None, None, True, "t", 1, ("i",), None, False),
    )
    conversation = Conversation("u", (*turns, Turn("tool", "r", answers="i")), "s", "o")
    assert load_line(dump_line(conversation)) == conversation


def test_inspect_tells_what_the_template_asks_for() -> None:
    console, said = Console(record=True, width=120), "cut into one sample per reply, as the chat template asks"
    stages = [
        {"name": "clean", "changed": {"text: whitespace": 3}},
        {"name": "pair", "changed": {said: 1200}},
        {"name": "split"},
    ]
    print_samples({"stages": stages}, console)
    assert console.export_text() == f"pair: 1,200 x {said}\n"
