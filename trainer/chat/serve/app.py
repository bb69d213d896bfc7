"""The HTTP side: an OpenAI-compatible API and a chat page over one `Engine`.

    GET /   GET /health   GET /metrics   GET /v1/models   POST /v1/chat/completions   POST /v1/completions

Rules: bodies are limited in size and in the time they may take; JSON only (a foreign web page cannot post it without a
preflight, which is never granted: CORS is off); without a token only loopback host names are answered, so that a
rebound domain name reaches nothing; a client that goes away takes its reply with it.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from chatmill.config import ConfigError

from ....data.tokenizer.tokenizer import ChatTokenizer
from ...generation.generation import TokenStep, check_prompt
from .engine import BusyError, Done, Engine, Event, Failed, Job, Piece
from .protocol import (
    ChatRequest,
    RequestError,
    TextRequest,
    chat_logprobs,
    parse,
    text_logprobs,
    usage,
)

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
KEEP_ALIVE_S = 10.0
DISCONNECT_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """max_tokens: of a reply, whatever the client asks. timeout_s: from arrival to the last token, waiting included."""

    max_body_bytes: int = 2 << 20
    body_timeout_s: float = 20.0
    max_tokens: int = 4096
    default_tokens: int = 512
    timeout_s: float = 300.0


def create_app(engine: Engine, *, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """The application; it closes the engine when it shuts down."""
    limits = limits or Limits()
    chat = engine.chat
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="Chatmill", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    app.add_middleware(Guard, token=token)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return refusal(error)

    @app.exception_handler(404)
    async def not_found(request: Request, _: Exception) -> Response:
        return refusal(RequestError(404, f"{request.url.path}: no such endpoint.", code="not_found"))

    @app.exception_handler(405)
    async def wrong_method(request: Request, _: Exception) -> Response:
        return refusal(RequestError(405, f"{request.method} is not possible on {request.url.path}."))

    @app.get("/")
    async def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'"
        )
        headers = {
            "Content-Security-Policy": policy + "; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("__NONCE__", nonce), headers=headers)

    @app.get("/health")
    async def health() -> Response:
        active, waiting = engine.load
        return JSONResponse({"status": "ok", "model": chat.name, "active": active, "waiting": waiting})

    @app.get("/metrics")
    async def metrics() -> Response:
        active, waiting = engine.load
        lines = [f"# TYPE chatmill_{k}_total counter\nchatmill_{k}_total {v}" for k, v in asdict(engine.counts).items()]
        lines += [f"# TYPE chatmill_{k} gauge\nchatmill_{k} {v}" for k, v in (("active", active), ("waiting", waiting))]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        entry = {"id": chat.name, "object": "model", "created": started, "owned_by": "chatmill"}
        return JSONResponse({"object": "list", "data": [entry | {"context_length": chat.model.config.context}]})

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await complete(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(request, TextRequest)

    async def complete(request: Request, kind: type[ChatRequest | TextRequest]) -> Response:
        deadline = time.monotonic() + limits.timeout_s
        try:
            asked = parse(kind, await read_json(request, limits))
        except ClientDisconnect:
            return Response(status_code=499)
        if asked.model not in (None, chat.name):
            raise RequestError(
                404, f"model {asked.model!r} is not served here; this is {chat.name!r}.", param="model", code="model_not_found"
            )
        prompts = await run_in_threadpool(asked.prompts, chat.tokenizer)
        for ids in prompts:
            try:
                check_prompt(ids, chat.model.config.context, chat.model.config.vocab_size)
            except ConfigError as error:
                long = len(ids) >= chat.model.config.context
                code = "context_length_exceeded" if long else None
                raise RequestError(400, str(error), param="messages" if kind is ChatRequest else "prompt", code=code) from None
        loop = asyncio.get_running_loop()
        echo = isinstance(asked, TextRequest) and asked.echo
        wanted = limits.default_tokens if asked.wanted_tokens is None else asked.wanted_tokens
        jobs: list[Job] = []
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()  # of all replies, each with its index

        def emit(index: int, event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        try:
            for ids in prompts:
                for k in range(asked.n or 1):
                    job = Job(
                        prompt_ids=ids,
                        max_new_tokens=max(1, min(wanted, limits.max_tokens)),
                        emit=functools.partial(emit, len(jobs)),
                        sampling=asked.sampling,
                        stop_strings=asked.stops,
                        seed=None if asked.seed is None else asked.seed + k,
                        logprobs=asked.wanted_logprobs,
                        prompt_logprobs=asked.wanted_logprobs if echo else None,
                        deadline=deadline,
                    )
                    jobs.append(job)
                    engine.submit(job)
        except BusyError as error:
            for job in jobs:
                job.cancel()
            raise RequestError(429, str(error), code="queue_full") from None
        shape = Shape(chat.name, isinstance(asked, ChatRequest))
        prompt_tokens = sum(map(len, prompts))
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            body = stream(jobs, events, shape, prompt_tokens if with_usage else None)
            return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await whole(request, jobs, events, shape, prompt_tokens, Echo(wanted > 0) if echo else None)

    async def stream(
        jobs: list[Job], events: asyncio.Queue[tuple[int, Event]], shape: Shape, prompt_tokens: int | None
    ) -> AsyncIterator[str]:
        """Server-sent events; prompt_tokens: count to send at the end, with the generated ones."""
        try:
            offsets, going, generated = [0] * len(jobs), len(jobs), 0
            if shape.is_chat:
                for index in range(len(jobs)):
                    yield sse(shape.chunk(index, {"role": "assistant", "content": ""}))
            while going:
                try:
                    index, event = await asyncio.wait_for(events.get(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield ": waiting\n\n"
                    continue
                if isinstance(event, Piece):
                    told = logprobs_of(jobs[index], shape, event.steps, offsets[index])
                    offsets[index] += len(event.text)
                    yield sse(shape.chunk(index, {"content": event.text} if shape.is_chat else event.text, logprobs=told))
                elif isinstance(event, Done):
                    yield sse(shape.chunk(index, {} if shape.is_chat else "", finish_reason=event.finish_reason))
                    going, generated = going - 1, generated + event.completion_tokens
                else:
                    yield sse(RequestError(504 if event.kind == "timeout" else 500, event.message).body())
                    break
            if prompt_tokens is not None and not going:
                yield sse(shape.chunk(0, None) | {"choices": [], "usage": usage(prompt_tokens, generated)})
            yield "data: [DONE]\n\n"
        finally:
            for job in jobs:
                job.cancel()  # without effect on a finished reply

    async def whole(
        request: Request,
        jobs: list[Job],
        events: asyncio.Queue[tuple[int, Event]],
        shape: Shape,
        prompt_tokens: int,
        echo: Echo | None,
    ) -> Response:
        choices, generated = list[dict[str, Any]](), 0
        try:
            replies = await finished(request, len(jobs), events)
            if replies is None:
                return Response(status_code=499)
            for job, (text, steps, done) in zip(jobs, replies, strict=True):
                told = logprobs_of(job, shape, steps, 0)
                tokens = done.completion_tokens
                if echo is not None:
                    text, told, tokens = echo.apply(chat.tokenizer, job, text, steps, done)
                choices.append(shape.choice(len(choices), text, told, done.finish_reason))
                generated += tokens
            return JSONResponse(shape.answer(choices) | {"usage": usage(prompt_tokens, generated)})
        finally:
            for job in jobs:
                job.cancel()

    async def finished(
        request: Request, count: int, events: asyncio.Queue[tuple[int, Event]]
    ) -> list[tuple[str, list[TokenStep], Done]] | None:
        """(text, tokens, end) of each reply; None when the client has gone."""
        texts, steps, ends = [""] * count, [list[TokenStep]() for _ in range(count)], dict[int, Done]()
        while len(ends) < count:
            try:
                index, event = await asyncio.wait_for(events.get(), DISCONNECT_POLL_S)
            except TimeoutError:
                if await request.is_disconnected():
                    return None
                continue
            if isinstance(event, Piece):
                texts[index] += event.text
                steps[index] += event.steps
                if events.empty() and await request.is_disconnected():
                    return None
            elif isinstance(event, Failed):
                raise RequestError(504 if event.kind == "timeout" else 500, event.message, code=event.kind)
            else:
                ends[index] = event
        return [(texts[index], steps[index], ends[index]) for index in range(count)]

    def logprobs_of(
        job: Job, shape: Shape, steps: list[TokenStep] | tuple[TokenStep, ...], offset: int
    ) -> dict[str, Any] | None:
        if job.logprobs is None:
            return None
        return chat_logprobs(chat.tokenizer, steps) if shape.is_chat else text_logprobs(chat.tokenizer, steps, offset)

    return app


class Guard:
    """Turns away strangers before anything is read: a wrong token, or a foreign host name where there is no token."""

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


class Shape:
    """The JSON of one completion, chat or plain, whole or in chunks."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self.is_chat = is_chat
        self._model = model
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def chunk(
        self, index: int, content: Any, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        """One event of a stream: more of the reply `index`."""
        body = {"delta" if self.is_chat else "text": content, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._envelope("chat.completion.chunk" if self.is_chat else "text_completion", [{"index": index} | body])

    def choice(self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str) -> dict[str, Any]:
        """One whole reply."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return {"index": index} | content | {"logprobs": logprobs, "finish_reason": finish_reason}

    def answer(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """All replies to a request."""
        return self._envelope("chat.completion" if self.is_chat else "text_completion", choices)


@dataclass(frozen=True, slots=True)
class Echo:
    """An answer that begins with its prompt. with_reply: something was to be generated after it."""

    with_reply: bool

    def apply(
        self, tokenizer: ChatTokenizer, job: Job, text: str, steps: list[TokenStep], done: Done
    ) -> tuple[str, dict[str, Any] | None, int]:
        """(text, log-probabilities, generated tokens)."""
        prompt = tokenizer.decode(job.prompt_ids)
        if not self.with_reply:
            text, steps, stop, tokens = "", [], None, 0
        else:
            stop, tokens = done.stop_step, done.completion_tokens
        if job.logprobs is None:
            return prompt + text, None, tokens
        every = [*done.prompt_steps, *steps, *([stop] if stop is not None else [])]
        return prompt + text, text_logprobs(tokenizer, every, 0, first=job.prompt_ids[0]), tokens


def sse(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def refusal(error: RequestError) -> JSONResponse:
    """An error as the OpenAI client expects it."""
    headers = {429: {"Retry-After": "2"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


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


async def read_json(request: Request, limits: Limits) -> Any:
    """The body as JSON, within the limits of size and time. Raises RequestError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "expected Content-Type: application/json.")
    too_large = RequestError(413, f"the body is larger than {limits.max_body_bytes:,} bytes.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {limits.body_timeout_s:.0f} s.") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
