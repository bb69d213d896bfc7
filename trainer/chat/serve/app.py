"""The HTTP side: an OpenAI-compatible API and a chat page over one `Batcher` per model in memory.

    GET /   GET /health   GET /metrics   GET /v1/models   GET /v1/models/{id}
    POST /v1/chat/completions   POST /v1/completions

Rules: bodies are limited in size and in the time they may take; JSON only (a foreign web page cannot post it without a
preflight, which is never granted: CORS is off); without a token only loopback host names are answered, so that a
rebound domain name reaches nothing; a client that goes away takes its reply with it. `model` of a request chooses among several
models; without it the first answers.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from chatmill.config import ConfigError

from ....data.tokenizer.plain import PlainText
from ...generation.grammar import Grammar, Grammars
from ...generation.prompt import check_prompt, most_bytes
from ..chat_model import ChatModel
from ..tools.forced import forced_call
from ..tools.reply_parts import Speech
from .batcher import Batcher
from .bodies import SMALL, Bodies, give_memory_back, parse_json
from .completion import Completion, Limits
from .connections import CrowdCheck, Door
from .errors import RequestError, refusal
from .protocol import MAX_REPLIES, ChatRequest, TextRequest, named_first, parse

PAGE = Path(__file__).with_name("page.html")
PREPARED_AT_ONCE = (4, 1)  # requests with small and with large bodies: a long prompt takes seconds and much memory
T = TypeVar("T")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


def create_app(service: Service, *, token: str | None = None, door: Door | None = None) -> FastAPI:
    """The application. door: counts the requests."""
    app = FastAPI(title="Chatmill", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(HostOrTokenCheck, token=token)
    if door is not None:
        app.add_middleware(CrowdCheck, door=door)
    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(404, not_found)
    app.add_exception_handler(405, wrong_method)
    app.get("/")(page)
    app.get("/health")(service.health)
    app.get("/metrics")(service.metrics)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    app.post("/v1/chat/completions")(service.chat_completions)
    app.post("/v1/completions")(service.completions)
    return app


class ServedModel:
    """One of the models with what its requests need."""

    def __init__(self, batcher: Batcher, chat: ChatModel) -> None:
        self.batcher, self.chat = batcher, chat
        batcher.on_idle = give_memory_back
        self.name, self.config = self.chat.name, self.chat.model.config
        self.plain = PlainText(self.chat.tokenizer)
        self.most_bytes = most_bytes(self.chat.tokenizer, self.config.context)
        self.grammars = Grammars(self.chat.tokenizer, self.config.vocab_size)
        self.speech = Speech.of(self.chat.tokenizer, self.chat.call_form)


class Service:
    """The endpoints that need a model. batchers: one per model in memory; all their chats have different names."""

    def __init__(self, batchers: Sequence[Batcher], limits: Limits) -> None:
        self._batchers = batchers
        self.served = {chat.name: ServedModel(batcher, chat) for batcher in batchers for chat in batcher.chats}
        assert len(self.served) == sum(len(batcher.chats) for batcher in batchers) > 0
        self.limits = limits
        self.started = int(time.time())
        self._small, self._large = (asyncio.Semaphore(count) for count in PREPARED_AT_ONCE)
        self._bodies = Bodies(limits)

    async def close(self) -> None:
        """End every reply and refuse every request, with an error that says why."""
        self._bodies.close()
        await asyncio.gather(*(in_thread(batcher.close) for batcher in self._batchers))

    async def health(self) -> Response:
        """Whether the server answers, and how busy it is."""
        active, waiting = map(sum, zip(*(batcher.load for batcher in self._batchers), strict=True))
        first = next(iter(self.served))
        return JSONResponse({"status": "ok", "model": first, "active": active, "waiting": waiting})

    async def metrics(self) -> Response:
        """Counters and gauges for Prometheus; of several models each has its own, with its name as a label."""
        kinds: dict[str, str] = {}
        values: dict[str, list[str]] = {}
        for name, model in self.served.items():
            label = f"{{model={json.dumps(name, ensure_ascii=False)}}}" if len(self.served) > 1 else ""
            counters = {f"{k}_total": ("counter", v) for k, v in asdict(model.batcher.counts_of[name]).items()}
            gauges = {k: ("gauge", v) for k, v in zip(("active", "waiting"), model.batcher.load_of(model.chat), strict=True)}
            for key, (kind, value) in (counters | gauges).items():
                kinds[key] = kind
                values.setdefault(key, []).append(f"chatmill_{key}{label} {value}")
        lines = [line for key, kind in kinds.items() for line in (f"# TYPE chatmill_{key} {kind}", *values[key])]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        """The models that are served."""
        return JSONResponse({"object": "list", "data": [self._entry(model) for model in self.served.values()]})

    async def model(self, name: str) -> Response:
        """The entry of one of them by its name."""
        return JSONResponse(self._entry(self._chosen(name)))

    def _entry(self, model: ServedModel) -> dict[str, Any]:
        entry = {"id": model.name, "object": "model", "created": self.started, "owned_by": "chatmill"}
        return entry | {"context_length": model.config.context}

    def _chosen(self, name: str | None) -> ServedModel:
        """The model of that name; without a name the first one. Raises RequestError."""
        model = next(iter(self.served.values())) if name is None else self.served.get(name)
        if model is None:
            names = " or ".join(map(repr, self.served))
            text = f"model {(name or '')[:200]!r} is not served here; this is {names}."
            raise RequestError(404, text, param="model", code="model_not_found")
        return model

    async def chat_completions(self, request: Request) -> Response:
        """Reply to a conversation."""
        return await self._complete(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        """Continue texts or token ids."""
        return await self._complete(request, TextRequest)

    async def _complete(self, request: Request, kind: type[ChatRequest | TextRequest]) -> Response:
        deadline = time.monotonic() + self.limits.timeout_s
        try:
            async with self._bodies.read(request) as body, self._large if len(body) > SMALL else self._small:
                if await request.is_disconnected():
                    raise ClientDisconnect
                model, asked, prompts, grammar = await in_thread(self._prepare, kind, body)
        except ClientDisconnect:
            return Response(status_code=499)
        completion = Completion(asked, prompts, model.chat, self.limits, deadline, grammar, model.speech)
        completion.submit(model.batcher)
        if asked.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(completion.stream(), media_type="text/event-stream", headers=headers)
        answer = await completion.whole(request)
        return Response(status_code=499) if answer is None else Response(answer, media_type="application/json")

    def _prepare(
        self, kind: type[ChatRequest | TextRequest], body: bytearray
    ) -> tuple[ServedModel, ChatRequest | TextRequest, list[list[int]], Grammar | None]:
        """(model, request, prompts, grammar) of a body. Raises RequestError; what cannot fit is refused untokenised."""
        most = max(model.config.context for model in self.served.values())
        raw = self._in_turn(body, parse_json, body, MAX_REPLIES * most)  # ids of the largest request
        asked = self._in_turn(body, parse, kind, raw)
        model = self._chosen(asked.model)
        grammar = grammar_of(asked, model)
        config = model.config
        where = "messages" if kind is ChatRequest else "prompt"
        if (size := asked.prompt_bytes) > model.most_bytes:
            text = f"{where}: {size:,} bytes. The model's context is {config.context} tokens, which no text of more than "
            text += f"{model.most_bytes:,} bytes fits. Shorten it."
            raise RequestError(400, text, param=where, code="context_length_exceeded")
        prompts = asked.prompts(model.chat.tokenizer, model.plain, model.speech)
        for ids in prompts:
            try:
                check_prompt(ids, config.context, config.vocab_size)
            except ConfigError as error:
                code = "context_length_exceeded" if len(ids) >= config.context else None
                raise RequestError(400, str(error), param=where, code=code) from None
        if isinstance(asked, ChatRequest) and asked.must_call:
            grammar = call_grammar(asked, model, prompts[0])
        return model, asked, prompts, grammar

    def _in_turn(self, body: bytearray, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a call that keeps Python's lock for long where the body is large: then between two steps."""
        if len(body) <= SMALL:
            return function(*arguments)
        with ExitStack() as stack:
            for batcher in self._batchers:  # in the same order everywhere: none waits for another in a circle
                stack.enter_context(batcher.gate.piece(len(body)))
            return function(*arguments)


def grammar_of(asked: ChatRequest | TextRequest, model: ServedModel) -> Grammar | None:
    """The grammar of the replies. Raises RequestError for one that cannot be, and for what this model cannot do."""
    schema = asked.wanted_schema
    try:
        forced = schema is not None or (isinstance(asked, ChatRequest) and asked.must_call)
        asked.sampling({}).check_against(model.config.vocab_size, with_grammar=forced)
    except ValueError as error:
        raise RequestError(400, str(error), param=named_first(str(error))) from None
    try:
        return None if schema is None else model.grammars.json(schema)
    except ConfigError as error:
        raise RequestError(400, f"response_format: {error}", param="response_format") from None


def call_grammar(asked: ChatRequest, model: ServedModel, prompt: list[int]) -> Grammar:
    """The grammar of a reply that must be a call. Raises RequestError."""
    tokenizer = model.chat.tokenizer
    try:
        return forced_call(model.grammars, tokenizer, model.speech, asked.offered, tokenizer.decode(prompt[-24:]))
    except ConfigError as error:
        raise RequestError(400, f"tool_choice: {error}", param="tool_choice") from None


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a thread, which nobody waits for when the server ends."""
    return await anyio.to_thread.run_sync(functools.partial(function, *arguments), abandon_on_cancel=True)


async def page() -> Response:
    """The chat page; its script and style run by a nonce, nothing else is loaded."""
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'"
    headers = {
        "Content-Security-Policy": policy + "; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("__NONCE__", nonce), headers=headers)


async def refused(_: Request, error: Exception) -> Response:
    """A RequestError as its answer."""
    assert isinstance(error, RequestError)
    return refusal(error)


async def not_found(request: Request, _: Exception) -> Response:
    """404 as JSON."""
    return refusal(RequestError(404, f"{request.url.path}: no such endpoint.", code="not_found"))


async def wrong_method(request: Request, _: Exception) -> Response:
    """405 as JSON."""
    return refusal(RequestError(405, f"{request.method} is not possible on {request.url.path}."))


class HostOrTokenCheck:
    """Refuses a wrong token, or a foreign host name where there is no token, before anything is read."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                if self._token is None:
                    check_host(headers.get("host", ""))
                elif scope["path"] not in ("/", "/health"):
                    check_token(headers.get("authorization", ""), self._token)
            except RequestError as error:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_token(header: str, token: str) -> None:
    """Raise RequestError(401) unless the header is `Bearer <token>`."""
    kind, _, given = header.partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise RequestError(401, "missing or wrong token: send Authorization: Bearer <token>.", code="invalid_api_key")


def check_host(host: str) -> None:
    """Raise RequestError(403) for a Host header that does not name this machine's loopback."""
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or (host.startswith("[") and "]:" in host) else host
    if name.lower() not in LOOPBACK:
        raise RequestError(403, f"host {host[:100]!r} is not served without a token.", code="host_refused")
