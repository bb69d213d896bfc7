"""What keeps Python's lock or the event loop for long goes in pieces, each between two steps. Counted, not timed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from chatmill.data.tokenizer.plain import PlainText
from chatmill.trainer.chat.chat_model import ChatModel

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from chatmill.trainer.chat.serve import app, batcher, bodies
from chatmill.trainer.chat.serve.app import Limits
from chatmill.trainer.chat.serve.batcher import Batcher
from chatmill.trainer.chat.serve.completion import Completion
from chatmill.trainer.chat.serve.errors import RequestError
from chatmill.trainer.chat.serve.gate import Gate
from chatmill.trainer.chat.serve.jobs import Done, Event, Piece
from chatmill.trainer.chat.serve.protocol import MAX_REPLIES, ChatRequest
from chatmill.trainer.generation.generation import TokenStep

from .server import HELLO, Served

LARGE = 100_000  # bytes, more than bodies.SMALL


def test_large_bodies_are_read_one_piece_at_a_time_between_two_steps_of_a_stream(
    chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, pieces, between = threading.Event(), [0], list[int]()
    advance = Batcher._advance

    def step(self: Batcher, group: Any) -> Any:
        between.append(pieces[0])
        pieces[0] = 0
        inside.set()
        try:
            return advance(self, group)
        finally:
            inside.clear()

    def piece(function: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            assert not inside.is_set(), "in the middle of a step"
            pieces[0] += 1
            try:
                return function(*arguments)
            finally:
                assert not inside.is_set(), "a step began in the middle of it"

        return counted

    monkeypatch.setattr(Batcher, "_advance", step)
    for name in ("parse_json", "parse"):
        monkeypatch.setattr(app, name, piece(getattr(app, name)))
    monkeypatch.setattr(bodies, "SMALL", 0)
    monkeypatch.setattr(app, "SMALL", 0)
    served = Served(Batcher(chat_model, max_active=4, max_waiting=300), limits=Limits(max_body_bytes=200_000))
    large = {"messages": [{"role": "user", "content": "a" * LARGE}]}
    with served.start_stream(ignore_eos=True), ThreadPoolExecutor(8) as pool:
        pieces[0] = 0  # those of the stream's own request, if it has not made a step yet
        between.clear()
        told = list(pool.map(lambda _: served.send("POST", "/v1/chat/completions", large)[0], range(8)))
        assert served.batcher.load[0] == 1  # the stream is still there
    assert told == [400] * 8  # more than the context holds
    assert len(between) >= 15 and max(between) == 1
    assert LARGE < served.batcher.gate.most_between_steps < LARGE + 200
    served.close()


def test_steps_and_pieces_take_turns_and_pieces_do_not_wait_for_a_batcher_that_rests() -> None:
    gate, order = Gate(), list[str]()

    def work(name: str) -> None:
        with gate.piece(1):
            order.append(name)

    with gate.piece(1):  # nothing is going on: at once
        pass
    with ThreadPoolExecutor(3) as pool:
        with gate.step():
            waiting = [pool.submit(work, "piece") for _ in range(3)]
            while gate._pieces < 3:
                pass
        for _ in range(2):
            with gate.step():
                order.append("step")
        gate.rest()
        for future in waiting:
            future.result(60)
    assert order == ["piece", "step", "piece", "step", "piece"]
    assert gate.most_between_steps == 1


def test_other_threads_go_on_while_a_long_text_is_tokenised(chat_model: ChatModel) -> None:
    """`Tokenizer.encode` kept Python's lock: a text of one megabyte stopped every stream for over a second."""
    plain, text = PlainText(chat_model.tokenizer), "hello there, how are you? " * 6_000
    turns, over = [0, 0], threading.Event()

    def encode() -> None:
        before = turns[0]
        plain.encode(text)
        turns[1] = turns[0] - before
        over.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not over.is_set():
        turns[0] += 1
        time.sleep(0.001)
    thread.join()
    assert turns[1] > 20  # it takes at least 0.1 s


def test_more_numbers_than_the_context_holds_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": [1] * 200_000}).encode()
    assert len(bodies.parse_json(body)["prompt"]) == 200_000
    assert bodies.parse_json(json.dumps({"prompt": ",[" * 200_000}).encode(), 1000)  # those in a text do not count
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(RequestError, match="more than 51,000 values, which this model's context"):
        bodies.parse_json(body, 1000)


def test_what_is_idle_is_given_back_once_when_nobody_asks(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "IDLE_S", 0.01)
    given = threading.Semaphore(0)
    monkeypatch.setattr(app, "give_memory_back", given.release)
    served = Served(Batcher(chat_model, max_active=4), limits=Limits())
    given.acquire(timeout=0.1)  # after the start
    for _ in range(2):
        assert served.chat()[0] == 200
        assert given.acquire(timeout=60)
    assert not given.acquire(timeout=0.1)
    served.close()


def test_an_answer_of_many_replies_is_written_one_reply_per_turn_of_the_event_loop(
    chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 replies with the alternatives of every token are hundreds of megabytes, during which nobody was answered."""
    turns, seen = [0], list[int]()
    choice = Completion._choice
    monkeypatch.setattr(Completion, "_choice", lambda *a: (seen.append(turns[0]), choice(*a))[1])

    async def tick() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def run() -> Any:
        asked = ChatRequest.model_validate(
            {"messages": HELLO["messages"], "n": MAX_REPLIES, "logprobs": True, "top_logprobs": 1}
        )
        completion = Completion(asked, [[1, 2]], chat_model, Limits(), float("inf"))
        events: list[Event] = [Piece("ah", (TokenStep(5, -0.5, ((5, -0.5),)),)), Done("stop", 1)]
        completion.submit(SimpleNamespace(submit=lambda job: [job.emit(event) for event in events]))  # type: ignore[arg-type]

        async def is_disconnected() -> bool:
            return False

        ticking = asyncio.create_task(tick())
        found = await completion.whole(SimpleNamespace(is_disconnected=is_disconnected))  # type: ignore[arg-type]
        ticking.cancel()
        return json.loads(found or b"")

    answer = asyncio.run(run())
    assert [c["index"] for c in answer["choices"]] == list(range(MAX_REPLIES)) and answer["usage"][
        "completion_tokens"
    ] == MAX_REPLIES
    assert {c["message"]["content"] for c in answer["choices"]} == {"ah"} and answer["object"] == "chat.completion"
    assert len(set(seen)) == MAX_REPLIES
