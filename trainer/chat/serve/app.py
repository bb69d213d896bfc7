"""The HTTP side: an OpenAI-compatible API and a chat page over one `Batcher`.

    GET /   GET /health   GET /metrics   GET /v1/models   GET /v1/models/{id}
    POST /v1/chat/completions   POST /v1/completions

Rules: bodies are limited in size and in the time they may take; JSON only (a foreign web page cannot post it without a
preflight, which is never granted: CORS is off); without a token only loopback host names are answered, so that a
rebound domain name reaches nothing; a client that goes away takes its reply with it.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import secrets
import time
from collections.abc import Callable
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


class Service:
    """The endpoints that need the model."""

    def __init__(self, batcher: Batcher, limits: Limits) -> None:
        self.batcher, self.limits = batcher, limits
        batcher.on_idle = give_memory_back
        self.chat = batcher.chat
        self.started = int(time.time())
        self._plain = PlainText(self.chat.tokenizer)
        self._most_bytes = most_bytes(self.chat.tokenizer, self.chat.model.config.context)
        self._small, self._large = (asyncio.Semaphore(count) for count in PREPARED_AT_ONCE)
        self._bodies = Bodies(limits)
        self._grammars = Grammars(self.chat.tokenizer, self.chat.model.config.vocab_size)

    async def close(self) -> None:
        """End every reply and refuse every request, with an error that says why."""
        self._bodies.close()
        await in_thread(self.batcher.close)

    async def health(self) -> Response:
        """Whether the server answers, and how busy it is."""
        active, waiting = self.batcher.load
        return JSONResponse({"status": "ok", "model": self.chat.name, "active": active, "waiting": waiting})

    async def metrics(self) -> Response:
        """Counters and gauges for Prometheus."""
        active, waiting = self.batcher.load
        counts = asdict(self.batcher.counts)
        lines = [f"# TYPE chatmill_{k}_total counter\nchatmill_{k}_total {v}" for k, v in counts.items()]
        lines += [f"# TYPE chatmill_{k} gauge\nchatmill_{k} {v}" for k, v in (("active", active), ("waiting", waiting))]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def model(self, name: str) -> Response:
        """The same entry by its name."""
        if name != self.chat.name:
            raise self._not_served(name)
        return JSONResponse(self._entry())

    def _entry(self) -> dict[str, Any]:
        entry = {"id": self.chat.name, "object": "model", "created": self.started, "owned_by": "chatmill"}
        return entry | {"context_length": self.chat.model.config.context}

    def _not_served(self, name: str) -> RequestError:
        text = f"model {name[:200]!r} is not served here; this is {self.chat.name!r}."
        return RequestError(404, text, param="model", code="model_not_found")

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
                asked, prompts, grammar = await in_thread(self._prepare, kind, body)
        except ClientDisconnect:
            return Response(status_code=499)
        completion = Completion(asked, prompts, self.chat, self.limits, deadline, grammar)
        completion.submit(self.batcher)
        if asked.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(completion.stream(), media_type="text/event-stream", headers=headers)
        answer = await completion.whole(request)
        return Response(status_code=499) if answer is None else Response(answer, media_type="application/json")

    def _prepare(
        self, kind: type[ChatRequest | TextRequest], body: bytearray
    ) -> tuple[ChatRequest | TextRequest, list[list[int]], Grammar | None]:
        """(request, prompts, grammar) of a body. Raises RequestError; what cannot fit the context is refused untokenised."""
        room = MAX_REPLIES * self.chat.model.config.context  # ids of the largest request
        raw = self._in_turn(body, parse_json, body, room)
        asked = self._in_turn(body, parse, kind, raw)
        if asked.model is not None and asked.model != self.chat.name:
            raise self._not_served(asked.model)
        grammar = self._grammar(asked)
        config = self.chat.model.config
        where = "messages" if kind is ChatRequest else "prompt"
        if (size := asked.prompt_bytes) > self._most_bytes:
            text = f"{where}: {size:,} bytes. The model's context is {config.context} tokens, which no text of more than "
            text += f"{self._most_bytes:,} bytes fits. Shorten it."
            raise RequestError(400, text, param=where, code="context_length_exceeded")
        prompts = asked.prompts(self.chat.tokenizer, self._plain)
        for ids in prompts:
            try:
                check_prompt(ids, config.context, config.vocab_size)
            except ConfigError as error:
                code = "context_length_exceeded" if len(ids) >= config.context else None
                raise RequestError(400, str(error), param=where, code=code) from None
        return asked, prompts, grammar

    def _in_turn(self, body: bytearray, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a call that keeps Python's lock for long where the body is large: then between two steps."""
        if len(body) <= SMALL:
            return function(*arguments)
        with self.batcher.gate.piece(len(body)):
            return function(*arguments)

    def _grammar(self, asked: ChatRequest | TextRequest) -> Grammar | None:
        """The grammar of the replies. Raises RequestError for one that cannot be, and for what this model cannot do."""
        schema = asked.wanted_schema
        try:
            asked.sampling({}).check_against(self.chat.model.config.vocab_size, with_grammar=schema is not None)
        except ValueError as error:
            raise RequestError(400, str(error), param=named_first(str(error))) from None
        try:
            return None if schema is None else self._grammars.json(schema)
        except ConfigError as error:
            raise RequestError(400, f"response_format: {error}", param="response_format") from None


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
