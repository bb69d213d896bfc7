"""Every field of a request is honoured (its effect is seen), harmless (nothing changes), or refused by its name."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.generation.generation import Generation

openai = pytest.importorskip("openai", reason="needs the openai client")

from chatmill.trainer.chat.serve.batcher import Batcher  # noqa: E402
from chatmill.trainer.chat.serve.fields import HARMLESS, REFUSED  # noqa: E402
from chatmill.trainer.chat.serve.protocol import ChatRequest, TextRequest  # noqa: E402

from .server import HELLO, Served, events_of, expected  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
ENDPOINTS = {"chat": ChatRequest, "text": TextRequest}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Al", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Client:
    """The official client, and the text of what it gets."""

    def __init__(self, served: Served, chat_model: ChatModel) -> None:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
        self.create = {"chat": client.chat.completions.create, "text": client.completions.create}
        self.tokenizer = chat_model.tokenizer
        self.base = {
            "chat": {"model": "tiny", "messages": HELLO["messages"], "temperature": 0, "max_tokens": 9},
            "text": {"model": "tiny", "prompt": "how are", "temperature": 0, "max_tokens": 9},
        }

    def answer(self, kind: str, **changes: Any) -> Any:
        given = self.base[kind] | changes
        return self.create[kind](**{name: value for name, value in given.items() if value is not ...})

    def text(self, kind: str, **changes: Any) -> str:
        choice = self.answer(kind, **changes).choices[0]
        return str(choice.message.content if kind == "chat" else choice.text)

    def length(self, kind: str, **changes: Any) -> int:
        return int(self.answer(kind, **changes).usage.completion_tokens)


@pytest.fixture(scope="module")
def client(served: Served, chat_model: ChatModel) -> Client:
    return Client(served, chat_model)


# -- what the client can say

Effect = Callable[[Client, str], bool]


def penalty_works(name: str) -> Effect:
    """Two tokens that the model would alternate between forever; the penalty makes it say more than these."""
    stuck = {"logit_bias": {"70": 6, "71": 5.5}, "max_tokens": 30}

    def effect(c: Client, kind: str) -> bool:
        return len(set(c.text(kind, **stuck, **{name: 2}))) > len(set(c.text(kind, **stuck)))

    return effect


def stream_works(c: Client, kind: str) -> bool:
    chunks = list(c.answer(kind, stream=True))
    said = [(x.choices[0].delta.content if kind == "chat" else x.choices[0].text) or "" for x in chunks]
    return len(chunks) > 5 and "".join(said) == c.text(kind)


def usage_comes(c: Client, kind: str) -> bool:
    last = list(c.answer(kind, stream=True, stream_options={"include_usage": True}))[-1]
    return last.choices == [] and last.usage.completion_tokens == c.length(kind)


def json_comes(c: Client, kind: str) -> bool:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    found = json.loads(c.text(kind, max_tokens=300, response_format=form))
    return set(found) == {"name", "age"}


def other_model_is_refused(c: Client, kind: str) -> bool:
    with pytest.raises(openai.NotFoundError, match="not served"):
        c.answer(kind, model="other")
    return True


def seeds_count(c: Client, kind: str) -> bool:
    first, again, other = (c.text(kind, temperature=1.5, seed=s) for s in (1, 1, 2))
    return first == again != other


def top_p_narrows(c: Client, kind: str) -> bool:
    return c.text(kind, temperature=1.5, seed=1, top_p=1e-9) == c.text(kind) != c.text(kind, temperature=1.5, seed=1)


def refused_here(**given: Any) -> Effect:
    """What depends on the model's template: this one has no form for tools (test_serve_tools.py has one that does)."""

    def effect(c: Client, kind: str) -> bool:
        with pytest.raises(openai.BadRequestError, match="no form for tools") as told:
            c.answer(kind, **given)
        return told.value.param == "tools" and told.value.code == "unsupported_parameter"

    return effect


TOOL = {"type": "function", "function": {"name": "f"}}
HONOURED: dict[str, Effect] = {
    "tools": refused_here(tools=[TOOL]),
    "tool_choice": refused_here(tools=[TOOL], tool_choice="required"),
    "parallel_tool_calls": refused_here(tools=[TOOL], parallel_tool_calls=False),
    "messages": lambda c, kind: c.text(kind, messages=[{"role": "user", "content": "how are you?"}]) != c.text(kind),
    "prompt": lambda c, kind: c.text(kind, prompt="I am") != c.text(kind),
    "model": other_model_is_refused,
    "frequency_penalty": penalty_works("frequency_penalty"),
    "presence_penalty": penalty_works("presence_penalty"),
    "logit_bias": lambda c, kind: c.text(kind, logit_bias={"70": 100}) == c.tokenizer.decode([70]) * 9,
    "logprobs": lambda c, kind: (
        c.answer(kind, logprobs=True if kind == "chat" else 1).choices[0].logprobs is not None
        and c.answer(kind).choices[0].logprobs is None
    ),
    "top_logprobs": lambda c, kind: (
        len(c.answer(kind, logprobs=True, top_logprobs=3).choices[0].logprobs.content[0].top_logprobs) == 3
    ),
    "max_completion_tokens": lambda c, kind: c.length(kind, max_tokens=..., max_completion_tokens=3) == 3,
    "max_tokens": lambda c, kind: c.length(kind, max_tokens=3) == 3,
    "n": lambda c, kind: len(c.answer(kind, n=3).choices) == 3,
    "response_format": json_comes,
    "seed": seeds_count,
    "stop": lambda c, kind: c.text(kind, stop=c.text(kind)[5:7]) == c.text(kind)[: c.text(kind).index(c.text(kind)[5:7])],
    "stream": stream_works,
    "stream_options": usage_comes,
    "temperature": lambda c, kind: len({c.text(kind, temperature=t, seed=3) for t in (0, 0.9, 3)}) == 3,
    "top_p": top_p_narrows,
    "echo": lambda c, kind: c.text(kind, echo=True) == "how are" + c.text(kind),
}
ASKS_FOR_MORE: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "ash"},
    "best_of": 3,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "reasoning_effort": "high",
    "suffix": "end",
    "verbosity": "low",
    "web_search_options": {},  # with its defaults
}
CHANGES_NOTHING: dict[str, Any] = {
    "metadata": {"a": "b"},
    "prediction": {"type": "content", "content": "hello"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "me",
    "service_tier": "flex",
    "store": True,
    "user": "me",
}
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
CREATE = {
    "chat": openai.resources.chat.completions.Completions.create,
    "text": openai.resources.completions.Completions.create,
}
SURFACE = [(kind, name) for kind, create in CREATE.items() for name in inspect.signature(create).parameters]


@pytest.mark.parametrize(("kind", "name"), [pair for pair in SURFACE if pair[1] not in OF_THE_CLIENT])
def test_every_parameter_of_the_official_client_is_honoured_harmless_or_refused(client: Client, kind: str, name: str) -> None:
    """A parameter that a new version of the client brings is in none of the tables, and fails here."""
    if name in HONOURED and name in ENDPOINTS[kind].model_fields:
        assert HONOURED[name](client, kind)
    elif name in CHANGES_NOTHING:
        assert name in HARMLESS
        assert client.text(kind, **{name: CHANGES_NOTHING[name]}) == client.text(kind)
    else:
        assert name in REFUSED
        with pytest.raises(openai.BadRequestError) as told:
            client.answer(kind, **{name: ASKS_FOR_MORE[name]})
        assert told.value.param == name and told.value.code == "unsupported_parameter" and name in str(told.value)


@pytest.mark.parametrize("method", ["parse", "stream"])
def test_the_clients_other_methods_have_no_parameters_of_their_own(client: Client, method: str) -> None:
    known = {name for _, name in SURFACE} | {"response_format"}
    assert set(inspect.signature(getattr(openai.resources.chat.completions.Completions, method)).parameters) <= known


def test_the_client_parses_replies_into_its_classes(served: Served) -> None:
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", name=(typing.Literal["Al", "Bo"], ...), age=(int, pydantic.Field(ge=0, le=9)))
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
    given = {"model": "tiny", "messages": HELLO["messages"], "response_format": person, "max_tokens": 300, "seed": 2}
    parsed = client.chat.completions.parse(**given).choices[0].message.parsed
    assert isinstance(parsed, person) and 0 <= parsed.age <= 9
    with client.chat.completions.stream(**given) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


@pytest.mark.parametrize(
    ("module", "name", "honoured"),
    [
        ("chat_completion_content_part_text_param", "ChatCompletionContentPartTextParam", {"type", "text"}),
        ("chat_completion_stream_options_param", "ChatCompletionStreamOptionsParam", {"include_usage"}),
        ("chat_completion_user_message_param", "ChatCompletionUserMessageParam", {"role", "content"}),
        ("chat_completion_assistant_message_param", "ChatCompletionAssistantMessageParam", {"role", "content", "tool_calls"}),
        ("chat_completion_tool_message_param", "ChatCompletionToolMessageParam", {"role", "content", "tool_call_id"}),
        ("chat_completion_function_tool_param", "ChatCompletionFunctionToolParam", {"type", "function"}),
    ],
)
def test_what_lies_inside_the_fields_of_the_client_is_known(module: str, name: str, honoured: set[str]) -> None:
    harmless = {"prompt_cache_breakpoint", "include_obfuscation"}
    refused = {"name", "audio", "function_call", "refusal"}
    kind = getattr(__import__(f"openai.types.chat.{module}", fromlist=[name]), name)
    assert set(typing.get_type_hints(kind)) <= honoured | harmless | refused


# -- extensions


def test_the_extensions_of_other_servers_work_by_their_names(client: Client, chat_model: ChatModel) -> None:
    def text(**body: Any) -> str:
        return client.text("text", extra_body=body)

    free = client.text("text")
    ids = [s.id for s in Generation(chat_model.model, chat_model.tokenizer.encode("how are"), max_new_tokens=9)]
    cut = chat_model.tokenizer.decode(ids[: ids.index(ids[4])])
    assert text(stop_token_ids=[ids[4]]) == cut
    assert client.length("text", extra_body={"stop_token_ids": [ids[4]], "min_tokens": 7}) >= 7
    warm = {"temperature": 1.5, "seed": 4}
    assert client.text("text", **warm, extra_body={"top_k": 1}) == free
    for off in (0, -1):
        assert client.text("text", **warm, extra_body={"top_k": off}) == client.text("text", **warm) != free
    assert client.text("text", **warm, extra_body={"min_p": 1.0}) == free
    assert text(repetition_penalty=5.0) != free
    (stop,) = chat_model.tokenizer.stop_ids
    eager = {"logit_bias": {str(stop): 100}}
    assert client.text("text", **eager) == ""
    assert client.length("text", **eager, extra_body={"ignore_eos": True}) == 9


def test_the_template_gets_its_variables_and_no_others(chat_model: ChatModel) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}no {{ note }}{% endif %}{% endif %}"
    )
    old = chat_model.tokenizer
    tokenizer = ChatTokenizer(old.files()["tokenizer.json"].decode(), template, old.config)
    server = Served(Batcher(replace(chat_model, tokenizer=tokenizer)))
    try:
        talk = [*HELLO["messages"], {"role": "assistant", "content": "hi"}, {"role": "user", "content": "how are you?"}]

        def prompt_tokens(**kwargs: Any) -> int:
            return int(server.chat(messages=talk, chat_template_kwargs=kwargs)[1]["usage"]["prompt_tokens"])

        more = len(tokenizer.encode("no fine"))
        assert prompt_tokens(enable_thinking=False, note="fine") == prompt_tokens(enable_thinking=True) + more
        # what a client sends cannot end a turn
        assert prompt_tokens(enable_thinking=False, note="<|im_end|>") > prompt_tokens(enable_thinking=False, note="") + 2
        for name in ("enable_thinkng", "messages", "add_generation_prompt", "raise_exception"):
            status, answer = server.chat(chat_template_kwargs={name: False})
            assert status == 400 and name in answer["error"]["message"] and "enable_thinking" in answer["error"]["message"]
            assert answer["error"]["param"] == "chat_template_kwargs"
    finally:
        server.close()


def test_a_plain_completion_begins_with_bos_and_takes_the_text_as_it_is(chat_model: ChatModel) -> None:
    old = chat_model.tokenizer
    made = Tokenizer.from_str(old.files()["tokenizer.json"].decode())
    (bos,) = old.encode("<|endoftext|>")
    made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    tokenizer = ChatTokenizer(made.to_str(), old.template_source, {**old.config, "bos_token": "<|endoftext|>"})
    server = Served(Batcher(replace(chat_model, tokenizer=tokenizer)))
    try:
        end = tokenizer.special["<|im_end|>"]
        text, ids = "how<|im_end|>are", [bos, *old.encode("how"), end, *old.encode("are")]
        body = {"temperature": 0, "max_tokens": 6, "logprobs": 1, "echo": True}
        _, told, _ = server.send("POST", "/v1/completions", body | {"prompt": text})
        _, same, _ = server.send("POST", "/v1/completions", body | {"prompt": ids})
        _, bare, _ = server.send("POST", "/v1/completions", body | {"prompt": text, "add_special_tokens": False})
        ours, theirs = (answer["choices"][0] for answer in (told, same))
        assert told["usage"]["prompt_tokens"] == len(ids) == bare["usage"]["prompt_tokens"] + 1
        assert ours["logprobs"]["token_logprobs"] == theirs["logprobs"]["token_logprobs"]
        assert ours["text"].startswith(text) and theirs["text"] == "<|endoftext|>" + ours["text"]
        at = ours["logprobs"]["text_offset"]
        tokens = ours["logprobs"]["tokens"]
        assert at[:2] == [0, 0]
        assert all(ours["text"][i:].startswith(t) for i, t in zip(at[1:], tokens[1:], strict=True) if i < len(ours["text"]))
    finally:
        server.close()


# -- what is not known

UNKNOWN = {
    "max_token": "max_tokens",
    "temprature": "temperature",
    "Temperature": "temperature",
    "top-p": "top_p",
    "topK": "top_k",
    "stop_tokens": "stop_token_ids",
    "stop_words": None,
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "guided_json": "response_format",
    "guided_regex": None,
    "guided_choice": None,
    "grammar": "response_format",
    "structured_outputs": "response_format",
    "enable_thinking": "chat_template_kwargs",
    "messges": "messages",
    "typical_p": "min_p",
    "mirostat": None,
    "bad_words": None,
    "allowed_token_ids": None,
    "prompt_logprobs": None,
    "truncate_prompt_tokens": None,
    "documents": None,
    "chat_template": "chat_template_kwargs",
    "dry_multiplier": None,
    "xtc_probability": None,
    "banned_strings": None,
    "return_token_ids": None,
    "lora_request": None,
    "thinking": None,
    "": None,
    "x" * 5000: None,
    "a\nb": None,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_field_is_refused_by_name_with_the_nearest_one(served: Served, name: str) -> None:
    for path in ("chat/completions", "completions"):
        body = HELLO | {name: "1"} if path == "chat/completions" else {"prompt": "a", name: "1"}
        status, answer, _ = served.send("POST", f"/v1/{path}", body)
        error = answer["error"]
        assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "unknown_parameter")
        assert error["param"].startswith(name[:100]) and len(error["message"]) < 400
    told = served.chat(**{name: "1"})[1]["error"]["message"]
    assert UNKNOWN[name] is None or f"Did you mean {UNKNOWN[name]!r}?" in told


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": "a"}, "prompt"),
        ({"echo": True}, "echo"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"messages": [{"role": "user", "content": "a", "name": "Zoë"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "style": "b"}]}]}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"tools": "none"}, "tools"),
        ({"best_of": True}, "best_of"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served: Served, changes: dict[str, Any], param: str) -> None:
    status, answer = served.chat(**changes)
    assert status == 400 and answer["error"]["param"] == param, answer
    assert param.split(".")[0] in answer["error"]["message"]


def test_null_and_empty_ask_for_nothing(served: Served, chat_model: ChatModel) -> None:
    nulls = dict.fromkeys([*ChatRequest.model_fields, *HARMLESS, *REFUSED], None)
    given = dict(HELLO)
    assistant = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}
    for changes in (nulls | given, {"tools": [], "functions": [], "logit_bias": {}, "stop": [], "modalities": ["text"]}):
        status, answer = served.chat(**changes)
        assert status == 200 and answer["choices"][0]["message"]["content"] == expected(chat_model, "hello", 12)
    assert served.chat(messages=[*HELLO["messages"], assistant, *HELLO["messages"]])[0] == 200


def test_a_model_can_be_looked_up(served: Served) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
    assert client.models.retrieve("tiny") == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="not served") as told:
        client.models.retrieve("org/other")
    assert told.value.code == "model_not_found"


# -- JSON


def test_json_mode_holds_in_streams_in_batches_and_beside_plain_replies(served: Served, chat_model: ChatModel) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}
    body = HELLO | {"temperature": 1.2, "seed": 5, "n": 3, "max_tokens": 120, "response_format": schema, "stream": True}
    links = [served.start_stream(max_tokens=60) for _ in range(2)]
    _, text, _ = served.send("POST", "/v1/chat/completions", body)
    for link in links:
        link.close()
    said, ends = [""] * 3, [""] * 3
    for choice in (event["choices"][0] for event in events_of(text)):
        said[choice["index"]] += choice["delta"].get("content", "")
        ends[choice["index"]] += choice["finish_reason"] or ""
    assert ends == ["stop"] * 3
    assert all(set(json.loads(one)) == {"name", "age"} for one in said)
    _, whole = served.chat(**body | {"stream": False})
    assert [choice["message"]["content"] for choice in whole["choices"]] == said
    status, answer, _ = served.send(
        "POST", "/v1/completions", {"prompt": ["a", "b"], "seed": 1, "max_tokens": 120, "response_format": schema}
    )
    assert status == 200 and all(json.loads(choice["text"]) for choice in answer["choices"])
    _, answer = served.chat(response_format={"type": "json_object"}, seed=1, max_tokens=4)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["choices"][0]["message"]["content"].startswith("{")
    assert served.chat(response_format={"type": "text"})[1]["choices"][0]["message"]["content"] == expected(
        chat_model, "hello", 12
    )


def test_without_the_grammar_library_json_is_refused_in_words(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    status, answer = served.chat(response_format={"type": "json_object"})
    assert status == 400 and "pip install" in answer["error"]["message"] and answer["error"]["param"] == "response_format"


# -- numbers and text at the edges

HUGE = 10**400


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1e-9, True, "1", "", [], {}, HUGE, 1e300, 100.1]),
        ("top_p", [0, -1, 1.0001, True, "0.5", HUGE]),
        ("top_k", [-2, 1.5, 2.0, True, "5"]),
        ("min_p", [-0.1, 1.1, True, "0"]),
        ("repetition_penalty", [0, -1, 1e-40, 1e40, True, "1", HUGE]),
        ("presence_penalty", [-2.1, 2.1, True, "0"]),
        ("frequency_penalty", [-2.1, 2.1, True, "0"]),
        ("seed", [2**63, -(2**63) - 1, HUGE, 1.0, 1.5, True, "1"]),
        ("n", [0, -1, 65, HUGE, 1.0, True, "2"]),
        ("max_tokens", [0, -1, 1.5, 2.0, True, "5"]),
        ("min_tokens", [-1, 1.0, True, "5", HUGE]),
        ("max_completion_tokens", [0, -1, True, "5"]),
        ("stop_token_ids", [[True], ["1"], [1.0], [-1], 5, [HUGE]]),
        ("ignore_eos", [1, "true", "yes"]),
        ("stream", [1, "true", "yes", []]),
        ("logprobs", [1, "true"]),
        ("top_logprobs", [True, "1", 21, -1]),
        ("stop", [1, True, [1], {"a": 1}, [""] * 2, ["a"] * 17]),
        ("logit_bias", [[1], "1", {"1": True}, {"1": "1"}, {"1": HUGE}, {"1" * 5000: 1}]),
        ("model", [1, ["tiny"]]),
    ],
)
def test_no_number_of_the_wrong_kind_is_taken(served: Served, name: str, values: list[Any]) -> None:
    for value in values:
        status, answer = served.chat(**{name: value} | ({"logprobs": True} if name == "top_logprobs" else {}))
        assert status == 400 and answer["error"]["param"].split(".")[0] == name, (value, answer)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 5000])
@pytest.mark.parametrize("name", ["temperature", "top_p", "seed", "logit_bias"])
def test_what_is_no_finite_number_is_refused(served: Served, name: str, number: str) -> None:
    value = '{"1": ' + number + "}" if name == "logit_bias" else number
    body = json.dumps(HELLO)[:-1].replace('"temperature": 0, ', "") + f', "{name}": {value}}}'
    status, answer, _ = served.send("POST", "/v1/chat/completions", body.encode())
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_extreme_numbers_that_mean_something_are_honoured(served: Served, chat_model: ChatModel) -> None:
    greedy = expected(chat_model, "hello", 12)
    for knobs in ({"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1, "top_p": 5e-324}, {"temperature": 0}):
        status, answer = served.chat(**knobs, seed=1)
        assert status == 200 and answer["choices"][0]["message"]["content"] == greedy, knobs
    for knobs in (
        {"temperature": 100},
        {"temperature": 1, "min_p": 5e-324},
        {"temperature": 1, "top_k": 10**30},
        {"repetition_penalty": 0.01},
        {"max_tokens": 10**30, "stop_token_ids": list(range(255))},
        {"seed": -(2**63), "n": 3, "temperature": 1},
        {"seed": 2**63 - 1, "n": 3, "temperature": 1},
    ):
        assert served.chat(**knobs)[0] == 200, knobs


LONE = '"\\ud83d"'


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": %s}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": %s}]}]}',
        '{"messages": [{"role": %s, "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "a"}], "stop": [%s]}',
        '{"messages": [{"role": "user", "content": "a"}], "model": %s}',
        '{"messages": [{"role": "user", "content": "a"}], "user": %s}',
        '{"messages": [{"role": "user", "content": "a"}], %s: 1}',
        '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": [%s]}}',
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(served: Served, body: str) -> None:
    raws = [(body % LONE).encode(), (body % '"\udc80\ud83d"').encode("utf-8", "surrogatepass")]
    for raw in raws:
        status, answer, _ = served.send("POST", "/v1/chat/completions", raw)
        assert status == 400 and "Unicode" in answer["error"]["message"], answer


def test_text_that_is_no_utf8_never_ends_in_a_server_error(served: Served) -> None:
    latin = '{"prompt": "é"}'.encode("latin1")
    for raw in (b'{"prompt": "\xff"}', b'{"prompt": "\xc3"}', b'{"\xf0\x9f": 1}', b"\xed\xa0\x80", latin):
        assert served.send("POST", "/v1/completions", raw)[0] == 400
    status, answer, _ = served.send("POST", "/v1/completions", b'{"prompt": "\\ud83d"}')
    assert status == 400 and answer["error"]["message"].startswith("prompt")
    whole = {"prompt": "\U0001f600 ok", "max_tokens": 2}
    assert served.send("POST", "/v1/completions", json.dumps(whole).encode())[0] == 200  # both halves: \ud83d\ude00
    for path in ("/v1/models/%ff", "/%ff%fe", "/v1/models/%ed%a0%80"):
        assert served.send("GET", path)[0] == 404


# -- the table


def test_the_table_in_the_docs_is_what_the_code_does() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = {}
    for names, chat, plain in re.findall(r"^\| (`.+?`) \| (\w+) \| (\w+) \|", text, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert name not in table, f"{name} is in the table twice"
            table[name] = (chat, plain)

    def does(kind: type[ChatRequest | TextRequest], name: str) -> str:
        return "honoured" if name in kind.model_fields else "harmless" if name in HARMLESS else "refused"

    names = {*ChatRequest.model_fields, *TextRequest.model_fields, *HARMLESS, *REFUSED}
    assert table == {name: (does(ChatRequest, name), does(TextRequest, name)) for name in names}
