"""Whose reply gets a place: no request delays another by its own number of replies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.chat.serve.batcher import Batcher
from chatmill.trainer.chat.serve.jobs import BusyError, Done, Event, Failed, Job, Piece
from chatmill.trainer.generation.generation import Generation
from chatmill.trainer.generation.sampling import Sampling

PLACES = 4


@pytest.fixture
def batcher(chat_model: ChatModel) -> Iterator[Batcher]:
    made = Batcher(chat_model, max_active=PLACES, max_waiting=300)
    yield made
    made.close()


class Request:
    """Some replies of one request, and what came of them. begun: the first token of any is there."""

    def __init__(self, chat: ChatModel, ended: list[str], name: str, count: int, tokens: int) -> None:
        self.name, self.ended = name, ended
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.failed: list[Failed] = []
        self.begun, self.over = threading.Event(), threading.Event()
        sampling, prompt = Sampling(temperature=1.0, ignore_eos=True), chat.tokenizer.encode("hello there")
        self.jobs = [Job(prompt, tokens, self._emit(k), sampling, seed=k, request=self) for k in range(count)]
        self._left, self._chat = count, chat

    @property
    def expected(self) -> list[list[int]]:
        """The ids of each reply when it is alone."""
        return [
            [
                s.id
                for s in Generation(
                    self._chat.model, j.prompt_ids, max_new_tokens=j.max_new_tokens, sampling=j.sampling, seed=j.seed
                )
            ]
            for j in self.jobs
        ]

    def _emit(self, k: int):  # type: ignore[no-untyped-def]
        def emit(event: Event) -> None:
            self.begun.set()
            if isinstance(event, Piece):
                self.ids[k] += [step.id for step in event.steps]
                return
            if isinstance(event, Done):
                self.ended.append(self.name)
            else:
                self.failed.append(event)
            self._left -= 1
            if not self._left:
                self.over.set()

        return emit

    def submit(self, batcher: Batcher) -> Request:
        for job in self.jobs:
            batcher.submit(job)
        return self


def test_a_request_for_many_replies_gives_way_to_others_and_loses_nothing(chat_model: ChatModel, batcher: Batcher) -> None:
    ended: list[str] = []
    many = Request(chat_model, ended, "many", 12, 60)
    others = [Request(chat_model, ended, name, count, 12) for name, count in (("one", 1), ("two", 2), ("another", 1))]
    many.submit(batcher)
    assert many.begun.wait(60)
    for other in others:
        other.submit(batcher)
    for request in (many, *others):
        assert request.over.wait(120) and not request.failed
        assert request.ids == request.expected, "a reply that paused goes on as if it had not"
    assert sorted(ended[:4]) == ["another", "one", "two", "two"], "12 tokens beside 60: all of them before the first of many"
    assert batcher.load == (0, 0)


def test_alone_a_request_has_the_whole_batch_and_equals_share_it(chat_model: ChatModel, batcher: Batcher) -> None:
    most = [0, 0]

    class Watching(Request):
        def _emit(self, k: int):  # type: ignore[no-untyped-def]
            emit, index = super()._emit(k), "ab".index(self.name)

            def watch(event: Event) -> None:
                held = [job for job in self.jobs if any(active.job is job for active in batcher._active)]
                most[index] = max(most[index], len(held))
                emit(event)

            return watch

    alone = Watching(chat_model, [], "a", 6, 20).submit(batcher)
    assert alone.over.wait(120) and most[0] == PLACES
    most[:] = 0, 0
    pair = [Watching(chat_model, [], name, 6, 60) for name in "ab"]
    pair[0].submit(batcher)
    assert pair[0].begun.wait(60)
    pair[1].submit(batcher)
    assert pair[1].over.wait(120) and pair[0].over.wait(120)
    assert [request.ids for request in pair] == [request.expected for request in pair]
    assert most[1] >= PLACES // 2


def test_the_next_place_goes_to_who_has_waited_longest(chat_model: ChatModel) -> None:
    """One place: of a request for many replies and one that came later, each gets it in turn."""
    batcher = Batcher(chat_model, max_active=1, max_waiting=2)
    ended: list[str] = []
    many = Request(chat_model, ended, "many", 6, 30).submit(batcher)
    assert many.begun.wait(60)
    late = Request(chat_model, ended, "late", 2, 3).submit(batcher)
    assert many.over.wait(60) and late.over.wait(60)
    assert ended.index("late") <= 2 and ended.count("many") == 6, ended
    assert "late" in ended[ended.index("late") + 1 :][:2], ended
    batcher.close()


def test_requests_wait_not_replies_and_what_waits_too_long_is_told(chat_model: ChatModel) -> None:
    """Six replies of one request are one that waits; another is told of its deadline while the place is taken."""
    batcher = Batcher(chat_model, max_active=1, max_waiting=2)
    first = Request(chat_model, [], "first", 1, 400).submit(batcher)
    assert first.begun.wait(60)
    many = Request(chat_model, [], "many", 6, 3).submit(batcher)
    hasty = Request(chat_model, [], "hasty", 2, 3)
    for job in hasty.jobs:
        job.deadline = time.monotonic()
    hasty.submit(batcher)
    assert hasty.over.wait(60) and [failed.kind for failed in hasty.failed] == ["timeout"] * 2
    assert not first.over.is_set()
    Request(chat_model, [], "another", 1, 3).submit(batcher)
    with pytest.raises(BusyError):
        Request(chat_model, [], "too many", 1, 3).submit(batcher)
    for job in (*first.jobs, *many.jobs):
        job.cancel()
    batcher.close()


def test_what_pauses_can_be_cancelled_and_is_told_of_the_end(chat_model: ChatModel) -> None:
    batcher = Batcher(chat_model, max_active=2, max_waiting=300)
    many = Request(chat_model, [], "many", 3, 400).submit(batcher)
    assert many.begun.wait(60)
    other = Request(chat_model, [], "other", 1, 400).submit(batcher)
    assert other.begun.wait(60)
    (paused,) = batcher._paused
    assert paused.job in many.jobs and batcher.load == (2, 2)
    paused.job.cancel()
    until = time.monotonic() + 60
    while batcher._paused and time.monotonic() < until:
        time.sleep(0.01)
    assert batcher.counts.cancelled == 1 and not batcher._paused
    batcher.close()
    assert [failed.kind for failed in (*many.failed, *other.failed)] == ["shutting_down"] * 3, (
        "the cancelled one is told nothing"
    )
