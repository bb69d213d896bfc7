"""The supported requests of the OpenAI API, and the answers, as plain data.

Unsupported fields that would change the answer are refused with status 400 (tools, JSON mode, penalties on presence and
frequency, logit_bias); harmless ones (user, metadata, store ...) are ignored.
Extensions: top_k, min_p, repetition_penalty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chatmill.config import ConfigError

from ....data.tokenizer.tokenizer import ChatTokenizer
from ...generation.generation import TokenStep
from ...generation.sampling import Sampling

MAX_REPLIES = 64  # to one request: prompts times n


class RequestError(Exception):
    """A request that is refused, with the HTTP status and the fields of an OpenAI error body."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON to send."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """include_usage: one more chunk with the token counts at the end of a stream."""

    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None  # without one: the model that is served
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=MAX_REPLIES)  # replies to one prompt; a seed gives seed, seed + 1, ...
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Request:
        for name in ("tools", "functions", "logit_bias", "audio", "suffix"):
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} is not supported by this server")
        form = (self.model_extra or {}).get("response_format")
        if isinstance(form, dict) and form.get("type") not in (None, "text"):
            raise ValueError("response_format: only text is supported by this server")
        stops = self.stops
        if len(stops) > 16 or any(not s or len(s) > 200 for s in stops):
            raise ValueError("stop: expected at most 16 strings of 1 to 200 characters")
        return self

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """Those given, else the model's own (defaults); without either the temperature is 1, as in the OpenAI API."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Sampling(**{"temperature": 1.0, **defaults, **given})


class Message(BaseModel):
    """One turn; content may come as a list of text parts.

    Tool calls and their results are refused, not ignored: the chat templates do not support them.
    """

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    @model_validator(mode="before")
    @classmethod
    def _refuse_tools(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            if raw.get("role") in ("tool", "function"):
                raise ValueError(f"role {raw['role']!r} is not supported: the chat template of this model knows no tools")
            for name in ("tool_calls", "function_call"):
                if raw.get(name):
                    raise ValueError(f"{name} is not supported: the chat template of this model knows no tools")
        return raw

    @property
    def text(self) -> str:
        """The content as one string. Raises RequestError for parts that are not text."""
        if isinstance(self.content, str):
            return self.content
        if any(p.get("type") != "text" or not isinstance(p.get("text"), str) for p in self.content):
            raise RequestError(400, "messages: only text content is supported.", param="messages")
        return "".join(p["text"] for p in self.content)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def prompts(self, tokenizer: ChatTokenizer) -> list[list[int]]:
        """The conversation as the model reads it: one prompt."""
        turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in self.messages]
        try:
            return [tokenizer.prompt_ids(turns)]
        except ConfigError as error:
            raise RequestError(400, f"messages: {error}", param="messages") from None

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

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool = False

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

    def prompts(self, tokenizer: ChatTokenizer) -> list[list[int]]:
        """Each text as tokens; special-token strings in it stay plain text."""
        found: list[list[int]] = []
        given: Any = self.prompt if self.is_batch else [self.prompt]
        for prompt in given:
            ids = tokenizer.encode(tokenizer.escape_special(prompt)) if isinstance(prompt, str) else [int(i) for i in prompt]
            if not ids:
                raise RequestError(400, "prompt: it is empty.", param="prompt")
            found.append(ids)
        return found

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives per token, or None without log-probabilities."""
        return self.logprobs

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens to generate; 16 unless given, as in the OpenAI API."""
        return 16 if self.max_tokens is None else self.max_tokens


def parse(kind: type[ChatRequest | TextRequest], raw: Any) -> ChatRequest | TextRequest:
    """kind(**raw), or a RequestError that names the first invalid field."""
    if not isinstance(raw, dict):
        raise RequestError(400, "the body must be a JSON object.")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ")
        raise RequestError(400, f"{where}: {told}." if where else f"{told}.", param=where or None) from None


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
    tokenizer: ChatTokenizer, steps: Sequence[TokenStep], offset: int = 0, first: int | None = None
) -> dict[str, Any]:
    """The `logprobs` of plain completions. offset: characters before the first of these tokens.

    first: the first token of an echoed prompt, which has no probability because nothing precedes it.
    """

    def text(token_id: int) -> str:
        return tokenizer.decoding.token_bytes(token_id).decode("utf-8", "replace")

    ids = [step.id for step in steps] if first is None else [first, *(step.id for step in steps)]
    tokens = [text(i) for i in ids]
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    chances: list[float | None] = [step.logprob for step in steps]
    top: list[dict[str, float] | None] = []
    for step in steps:
        told: dict[str, float] = {}
        for i, chance in step.top:  # best first: of two tokens with the same text, the more likely one stays
            told.setdefault(text(i), chance)
        top.append(told)
    if first is not None:
        chances, top = [None, *chances], [None, *top]
    return {"tokens": tokens, "token_logprobs": chances, "top_logprobs": top, "text_offset": offsets[: len(tokens)]}
