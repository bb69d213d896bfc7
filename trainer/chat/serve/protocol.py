"""The supported requests of the OpenAI API, and the answers, as plain data.

Fields that are not honoured here are refused by name unless they are harmless (fields.py). Extensions, with the names and
meanings of vLLM: top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos, chat_template_kwargs,
add_special_tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from chatmill.config import ConfigError

from ....data.tokenizer.plain import PlainText
from ....data.tokenizer.tokenizer import ChatTokenizer
from ...generation.generation import TokenStep
from ...generation.grammar import ANY_OBJECT
from ...generation.sampling import SEEDS, Sampling
from ..tools.messages import FIRST, NO_FORM, STRICT, Message, NamedTool, Tool, template_messages
from ..tools.reply_parts import Speech
from .errors import RequestError
from .fields import refuse_fields

MAX_REPLIES = 64  # to one request: prompts times n
MAX_STOP_IDS = 256
MAX_TOOLS = 128
Ids = Annotated[list[int], FIRST]

EXPECTED = {  # what a type of problem means to whoever wrote the JSON
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a text",
}
BOUNDS = {
    "extra_forbidden": "this field is unknown",
    "finite_number": "expected a finite number",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "literal_error": "expected {expected}",
    "missing": "it is missing",
    "string_too_long": "expected at most {max_length} characters",
    "too_long": "expected at most {max_length}, got {actual_length}",
    "too_short": "expected at least {min_length}, got {actual_length}",
}


class StreamOptions(BaseModel):
    """include_usage: one more chunk with the token counts at the end of a stream. include_obfuscation is harmless: none is."""

    model_config = STRICT

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(BaseModel):
    """A schema and its name; strict or not, it is enforced."""

    model_config = STRICT

    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """text, any JSON object, or JSON that a schema accepts."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema_if_it_needs_one(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('expected json_schema: {"name": ..., "schema": {...}} together with type "json_schema"')
        return self


class Request(BaseModel):
    """What both kinds of completion share."""

    model_config = STRICT

    model: str | None = None  # without one: the model that is served
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, ge=SEEDS[0], le=SEEDS[1])
    stop: str | Annotated[list[str], FIRST] | None = None
    stop_token_ids: Annotated[list[int], FIRST] | None = Field(default=None, max_length=MAX_STOP_IDS)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=MAX_REPLIES)  # replies to one prompt; a seed gives seed, seed + 1, ...
    response_format: ResponseFormat | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _numbers(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and not {int, float}.issuperset(map(type, raw.values())):
            raise ValueError("expected token ids, each with a value from -100 to 100")
        return raw

    @field_validator("logit_bias")
    @classmethod
    def _ids_and_values(cls, found: dict[str, float] | None) -> dict[str, float] | None:
        for name, value in (found or {}).items():
            is_id = name.isascii() and name.isdigit() and len(name) < 10 and name == str(int(name))  # "05" would be 5 again
            if not is_id or not -100 <= value <= 100:
                raise ValueError("expected token ids, each with a value from -100 to 100")
        return found

    @model_validator(mode="after")
    def _check_together(self) -> Request:
        stops = self.stops
        if len(stops) > 16 or any(not s or len(s) > 200 for s in stops):
            raise ValueError("stop: expected at most 16 strings of 1 to 200 characters")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only possible with stream")
        self.sampling({})  # whatever else it refuses
        return self

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """Those given, else the model's own (defaults); without either the temperature is 1, as in the OpenAI API."""
        knobs = "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty min_tokens ignore_eos"
        given = {name: value for name in knobs.split() if (value := getattr(self, name)) is not None}
        bias = {int(name): value for name, value in (self.logit_bias or {}).items()}
        lists = {"logit_bias": tuple(bias.items()), "stop_token_ids": tuple(self.stop_token_ids or ())}
        return Sampling(**{"temperature": 1.0, **defaults, **given, **lists})

    @property
    def wanted_schema(self) -> Mapping[str, Any] | None:
        """What a reply in JSON must follow; None: the reply is text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return ANY_OBJECT if form.json_schema is None else form.json_schema.schema_


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FIRST] = Field(min_length=1, max_length=10_000)
    tools: Annotated[list[Tool], FIRST] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only possible with logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
        if self.must_call and not self.offered:
            raise ValueError("tool_choice: it names no tool in tools")
        if self.must_call and self.wanted_schema is not None:
            raise ValueError("tool_choice: a reply cannot be a call and follow response_format")
        return self

    @property
    def must_call(self) -> bool:
        """Must the reply be a call?"""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that may be called."""
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool.declared() for tool in tools if chosen in (None, tool.function.name)]

    def prompts(self, tokenizer: ChatTokenizer, plain: PlainText, speech: Speech) -> list[list[int]]:
        """The conversation as the model reads it: one prompt."""
        variables = dict(self.chat_template_kwargs or {})
        if variables:
            try:
                tokenizer.template.check_variables(variables)
            except ConfigError as error:
                raise RequestError(400, f"chat_template_kwargs: {error}", param="chat_template_kwargs") from None
        if self.offered:
            if speech.form is None or not speech.can.tools:
                raise RequestError(400, f"tools: {NO_FORM}.", param="tools", code="unsupported_parameter")
            variables["tools"] = [tool.declared() for tool in self.tools or ()]
        try:
            return [tokenizer.prompt_ids(template_messages(self.messages, speech.can), variables)]
        except ConfigError as error:
            raise RequestError(400, f"messages: {error}", param="messages") from None

    @property
    def prompt_bytes(self) -> int:
        """Bytes of UTF-8 of all messages and tools."""
        return sum(m.size for m in self.messages) + sum(len(json.dumps(tool).encode()) for tool in self.offered)

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives per token, or None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens to generate."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Request):
    """POST /v1/completions: continue texts, or token ids, without a chat template.

    echo: the prompt is part of the answer; with logprobs its tokens are scored, which is what lm-evaluation-harness asks for.
    The logprobs of an echo end with the stop token, if one came, so that they always hold prompt plus generated tokens.
    max_tokens 0 (with echo): score the prompt, generate nothing.
    """

    prompt: str | Ids | Annotated[list[str], FIRST] | Annotated[list[Ids], FIRST]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool = False
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_echo(self) -> TextRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is possible only with echo")
        if self.stream and (self.echo or self.is_batch):
            raise ValueError("stream: not supported together with echo or with several prompts")
        if self.is_batch and len(self.prompt) * (self.n or 1) > MAX_REPLIES:
            raise ValueError(f"prompt: at most {MAX_REPLIES} replies in one request, prompts times n")
        return self

    @property
    def is_batch(self) -> bool:
        """Several prompts, or a list of one."""
        return isinstance(self.prompt, list) and bool(self.prompt) and not isinstance(self.prompt[0], int)

    @property
    def given(self) -> Sequence[str | Sequence[int]]:
        """The prompts as the client gave them."""
        found: Any = self.prompt if self.is_batch else [self.prompt]
        return found

    def prompts(self, tokenizer: ChatTokenizer, plain: PlainText, speech: Speech) -> list[list[int]]:
        """Each text as tokens: taken as it is, special tokens included, after the BOS token that the tokenizer puts there."""
        found: list[list[int]] = []
        for prompt in self.given:
            ids = plain.encode(prompt, self.add_special_tokens) if isinstance(prompt, str) else list(prompt)
            if not prompt:
                raise RequestError(400, "prompt: it is empty.", param="prompt")
            found.append(ids)
        return found

    @property
    def prompt_bytes(self) -> int:
        """Bytes of UTF-8 of the longest text; token ids are counted elsewhere."""
        return max((len(text.encode()) for text in self.given if isinstance(text, str)), default=0)

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives per token, or None without log-probabilities."""
        return self.logprobs

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens to generate; 16 unless given, as in the OpenAI API."""
        return 16 if self.max_tokens is None else self.max_tokens


def parse(kind: type[ChatRequest | TextRequest], raw: Any) -> ChatRequest | TextRequest:
    """kind(**raw), or a RequestError that names the first field that is unknown or invalid."""
    if not isinstance(raw, dict):
        raise RequestError(400, "the body must be a JSON object.")
    other: type[BaseModel] = TextRequest if kind is ChatRequest else ChatRequest
    given = refuse_fields(raw, kind.model_fields, other.model_fields)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        where, told = first_problem(error)
        if not where:  # a rule about several fields names the first of them
            raise RequestError(400, f"{told.rstrip('.')}.", param=named_first(told)) from None
        raise RequestError(400, f"{where}: {told}.", param=where) from None


def first_problem(error: ValidationError) -> tuple[str, str]:
    """(where, what) of the first problem, in our own words where pydantic's speak of Python.

    A field that takes several types has a problem for each of them. The deepest is told, of equally deep ones all.
    """
    problems = error.errors()
    place = _path(problems[0]["loc"])
    same = [(p, _path(p["loc"])) for p in problems]
    same = [(p, path) for p, path in same if path[: len(place)] == place or place[: len(path)] == path]
    depth = max(len(path) for _, path in same)
    deepest = [(p, path) for p, path in same if len(path) == depth]
    expected = [EXPECTED[p["type"]] for p, _ in deepest if p["type"] in EXPECTED]
    problem, place = deepest[0]
    if len(expected) == len(deepest):
        told = "expected " + " or ".join(dict.fromkeys(expected))
    elif problem["type"] in BOUNDS:
        told = BOUNDS[problem["type"]].format(**problem.get("ctx", {}))
    else:
        told = problem["msg"].removeprefix("Value error, ")
    return ".".join(place), told


def _path(loc: tuple[int | str, ...]) -> list[str]:
    """The names and positions that a client wrote, without pydantic's names of types."""
    return [str(part) for part in loc if isinstance(part, int) or not re.fullmatch(r"str|list\[.*\]", part)]


def named_first(message: str) -> str:
    """The field that an error names at its beginning: `min_tokens: ...`, `top_p=2: ...`."""
    return re.split(r"\W", message, maxsplit=1)[0]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of one completion."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def chat_logprobs(tokenizer: ChatTokenizer, steps: Sequence[TokenStep]) -> dict[str, Any]:
    """The `logprobs` of chat completions."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        said = tokenizer.decoding.token_bytes(token_id)  # perhaps only part of a character
        return {"token": said.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(said)}

    content = [entry(s.id, s.logprob) | {"top_logprobs": [entry(i, p) for i, p in s.top]} for s in steps]
    return {"content": content, "refusal": None}


def text_logprobs(
    tokenizer: ChatTokenizer, steps: Sequence[TokenStep], offsets: Sequence[int], first: int | None = None
) -> dict[str, Any]:
    """The `logprobs` of plain completions. offsets: where each token begins in the text of the answer.

    first: the first token of an echoed prompt, which has no probability because nothing precedes it.
    """

    def text(token_id: int) -> str:
        return tokenizer.decoding.token_bytes(token_id).decode("utf-8", "replace")

    ids = [step.id for step in steps] if first is None else [first, *(step.id for step in steps)]
    tokens = [text(i) for i in ids]
    chances: list[float | None] = [step.logprob for step in steps]
    top: list[dict[str, float] | None] = []
    for step in steps:
        told: dict[str, float] = {}
        for i, chance in step.top:  # best first: of two tokens with the same text, the more likely one stays
            told.setdefault(text(i), chance)
        top.append(told)
    if first is not None:
        chances, top = [None, *chances], [None, *top]
    return {"tokens": tokens, "token_logprobs": chances, "top_logprobs": top, "text_offset": list(offsets)}
