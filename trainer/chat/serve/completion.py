"""One completion request in progress: its jobs, their events, and the answer as OpenAI-shaped JSON, whole or streamed.

completion = Completion(asked, prompts, batcher.chat, limits, deadline)
completion.submit(batcher)                      # RequestError 429 where the queue is full
answer = await completion.whole(request)        # or: StreamingResponse(completion.stream())
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from ...generation.defaults import sampling_of
from ...generation.generation import TokenStep
from ...generation.grammar import Grammar
from ...generation.text_stream import TokenStarts
from ..chat_model import ChatModel
from ..tools.chat_reply import ChatReply
from ..tools.reply_parts import Speech
from .batcher import Batcher
from .errors import RequestError
from .jobs import BusyError, ClosedError, Done, Event, Failed, Job, Piece
from .protocol import ChatRequest, TextRequest, chat_logprobs, text_logprobs, usage

KEEP_ALIVE_S = 10.0
DISCONNECT_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """max_tokens: of a reply, whatever the client asks. timeout_s: from arrival to the last token, waiting included.

    max_connections: requests in progress at once, those that only arrive or wait among them.
    """

    max_connections: int = 512
    max_body_bytes: int = 2 << 20
    head_timeout_s: float = 10.0
    body_timeout_s: float = 20.0
    send_timeout_s: float = 30.0
    max_tokens: int = 4096
    default_tokens: int = 512
    timeout_s: float = 300.0


class Completion:
    """The replies to one request: `n` to each prompt. Create it on the event loop. deadline: time.monotonic()."""

    def __init__(
        self,
        asked: ChatRequest | TextRequest,
        prompts: list[list[int]],
        chat: ChatModel,
        limits: Limits,
        deadline: float,
        grammar: Grammar | None = None,
        speech: Speech | None = None,
    ) -> None:
        self.asked, self.chat = asked, chat
        self.is_chat = isinstance(asked, ChatRequest)
        self.has_echo = isinstance(asked, TextRequest) and asked.echo
        self.wanted_tokens = limits.default_tokens if asked.wanted_tokens is None else asked.wanted_tokens
        longest = max(1, min(self.wanted_tokens, limits.max_tokens))
        if (asked.min_tokens or 0) > longest:
            raise RequestError(
                400, f"min_tokens: {asked.min_tokens} is more than the longest reply ({longest}).", param="min_tokens"
            )
        self.prompt_tokens = sum(map(len, prompts))
        self._id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()  # of all replies, each with its index
        has_tools = isinstance(asked, ChatRequest) and bool(asked.offered)
        takes_apart = self.is_chat and speech is not None and (has_tools or speech.marks is not None)
        sampling = asked.sampling(sampling_of(chat.tokenizer.generation))
        self.jobs = [
            Job(
                prompt_ids=ids,
                max_new_tokens=longest,
                emit=functools.partial(self._emit, index),
                sampling=sampling,
                stop_strings=asked.stops,
                seed=None if asked.seed is None else asked.seed + k,
                logprobs=asked.wanted_logprobs,
                prompt_logprobs=asked.wanted_logprobs if self.has_echo else None,
                grammar=None if grammar is None else grammar.copy(),
                chat=chat,
                keeps_special=takes_apart,
                continues_prompt=not self.is_chat,
                request=self,
                deadline=deadline,
            )
            for index, (ids, k) in enumerate(itertools.product(prompts, range(asked.n or 1)))
        ]
        self._starts: dict[int, TokenStarts] = {}
        self._replies = [
            ChatReply(speech.parts(chat.tokenizer.decode(ids[-24:]), has_tools), asked.parallel_tool_calls is not False)
            for ids in (job.prompt_ids for job in self.jobs)
            if takes_apart and speech is not None and isinstance(asked, ChatRequest)
        ]

    def _emit(self, index: int, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def submit(self, batcher: Batcher) -> None:
        """Queue all jobs, or none. Raises RequestError."""
        try:
            for job in self.jobs:
                batcher.submit(job)
        except BusyError as error:
            self.cancel()
            raise RequestError(429, str(error), code="queue_full") from None
        except ClosedError as error:
            self.cancel()
            raise RequestError(503, str(error), code="shutting_down") from None

    def cancel(self) -> None:
        """Drop what is unfinished."""
        for job in self.jobs:
            job.cancel()

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            unfinished, generated = len(self.jobs), 0
            if self.is_chat:
                for index in range(len(self.jobs)):
                    yield sse(self._chunk(index, {"role": "assistant", "content": ""}))
            while unfinished:
                try:
                    index, event = await asyncio.wait_for(self._events.get(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield ": waiting\n\n"
                    continue
                if isinstance(event, Piece):
                    for content, logprobs in self._pieces(index, event):
                        yield sse(self._chunk(index, content, logprobs))
                elif isinstance(event, Done):
                    reason: str = event.finish_reason
                    if self._replies:
                        for delta in self._replies[index].finish():
                            yield sse(self._chunk(index, delta))
                        reason = self._replies[index].reason(reason)
                    yield sse(self._chunk(index, {} if self.is_chat else "", finish_reason=reason))
                    unfinished, generated = unfinished - 1, generated + event.completion_tokens
                else:
                    yield sse(failure(event).body())
                    break
            options = self.asked.stream_options
            if options is not None and options.include_usage and not unfinished:
                yield sse(self._chunk(0, None) | {"choices": [], "usage": usage(self.prompt_tokens, generated)})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()

    async def whole(self, request: Request) -> bytes | None:
        """The answer as JSON when all replies are finished; None when the client has gone. Raises RequestError.

        Between two replies others get their turn: 64 with the alternatives of every token are many megabytes.
        """
        choices, generated = list[str](), 0
        try:
            replies = await self._finished(request)
            if replies is None:
                return None
            for index, (text, steps, done) in enumerate(replies):
                tokens = done.completion_tokens
                if self.has_echo:
                    text, logprobs, tokens = self._with_prompt(index, text, steps, done)
                else:
                    logprobs = self._logprobs(index, steps)
                choices.append(to_json(self._choice(index, text, logprobs, done.finish_reason)))
                generated += tokens
                await asyncio.sleep(0)
            kind = "chat.completion" if self.is_chat else "text_completion"
            more = to_json(self._envelope(kind, []) | {"usage": usage(self.prompt_tokens, generated)})
            before, after = more.split('"choices":[]')
            return "".join((before, '"choices":[', ",".join(choices), "]", after)).encode()
        finally:
            self.cancel()

    async def _finished(self, request: Request) -> list[tuple[str, list[TokenStep], Done]] | None:
        """(text, tokens, end) of each reply; None when the client has gone."""
        count = len(self.jobs)
        texts, steps, ends = [""] * count, [list[TokenStep]() for _ in range(count)], dict[int, Done]()
        while len(ends) < count:
            try:
                index, event = await asyncio.wait_for(self._events.get(), DISCONNECT_POLL_S)
            except TimeoutError:
                if await request.is_disconnected():
                    return None
                continue
            if isinstance(event, Piece):
                texts[index] += event.text
                steps[index] += event.steps
                if self._events.empty() and await request.is_disconnected():
                    return None
            elif isinstance(event, Failed):
                raise failure(event)
            else:
                ends[index] = event
        return [(texts[index], steps[index], ends[index]) for index in range(count)]

    def _pieces(self, index: int, piece: Piece) -> Iterator[tuple[Any, dict[str, Any] | None]]:
        """(more of a reply, its log-probabilities) in the chunks of a stream."""
        logprobs = self._logprobs(index, piece.steps)
        if not self._replies:
            yield {"content": piece.text} if self.is_chat else piece.text, logprobs
            return
        deltas = self._replies[index].push(piece.text) or ([{}] if logprobs is not None else [])
        yield from ((delta, logprobs if number == 0 else None) for number, delta in enumerate(deltas))

    def _logprobs(self, index: int, steps: Sequence[TokenStep]) -> dict[str, Any] | None:
        """Log-probabilities of the next tokens of a reply."""
        if self.asked.wanted_logprobs is None:
            return None
        if self.is_chat:
            return chat_logprobs(self.chat.tokenizer, steps)
        return text_logprobs(self.chat.tokenizer, steps, self._offsets(index, steps))

    def _offsets(self, index: int, steps: Sequence[TokenStep]) -> list[int]:
        """Where the next tokens of a reply begin in its text."""
        if index not in self._starts:
            self._starts[index] = TokenStarts(self.chat.tokenizer, before=self.jobs[index].prompt_ids)
        return self._starts[index].add(step.id for step in steps)

    def _with_prompt(self, index: int, text: str, steps: list[TokenStep], done: Done) -> tuple[str, dict[str, Any] | None, int]:
        """(text, log-probabilities, generated tokens) of an answer that begins with its prompt, as it was given."""
        assert isinstance(self.asked, TextRequest)
        ids, tokenizer = self.jobs[index].prompt_ids, self.chat.tokenizer
        given = self.asked.given[index // (self.asked.n or 1)]
        prompt = given if isinstance(given, str) else tokenizer.decode(ids)
        stop, tokens = done.stop_step, done.completion_tokens
        if self.wanted_tokens == 0:
            text, steps, stop, tokens = "", [], None, 0
        if self.asked.wanted_logprobs is None:
            return prompt + text, None, tokens
        bos = tokenizer.decode(ids[:1])
        is_added = isinstance(given, str) and self.asked.add_special_tokens and ids[0] == tokenizer.bos_id
        is_hidden = is_added and (not prompt.startswith(bos) or list(ids[:2]) == [ids[0]] * 2)
        starts = TokenStarts(tokenizer, skip_special=False).add(ids[is_hidden:])
        offsets = [0] * is_hidden + [min(at, len(prompt)) for at in starts]
        steps = [*steps, *([stop] if stop is not None else [])]
        offsets += [len(prompt) + at for at in self._offsets(index, steps)]
        return prompt + text, text_logprobs(tokenizer, [*done.prompt_steps, *steps], offsets, ids[0]), tokens

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.chat.name, "choices": choices}

    def _chunk(
        self, index: int, content: Any, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        """One event of a stream: more of the reply `index`."""
        body = {"delta" if self.is_chat else "text": content, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._envelope("chat.completion.chunk" if self.is_chat else "text_completion", [{"index": index} | body])

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str) -> dict[str, Any]:
        """One whole reply."""
        content: dict[str, Any] = {"text": text}
        if self.is_chat:
            message = self._replies[index].whole(text) if self._replies else {"content": text}
            content = {"message": {"role": "assistant", **message, "refusal": None}}
            finish_reason = self._replies[index].reason(finish_reason) if self._replies else finish_reason
        return {"index": index} | content | {"logprobs": logprobs, "finish_reason": finish_reason}


def failure(event: Failed) -> RequestError:
    """A reply that could not be finished, as an HTTP error."""
    status = {"timeout": 504, "refused": 400, "shutting_down": 503}.get(event.kind, 500)
    return RequestError(status, event.message, code=event.kind)


def to_json(value: Mapping[str, Any]) -> str:
    """Without blanks."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def sse(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
