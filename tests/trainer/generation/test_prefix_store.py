"""The next turn reads only what is new, a long prompt holds nobody up, and replies are the same as without either."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.chat.serve import batcher as serving
from chatmill.trainer.chat.serve.batcher import Batcher, shares_of_prompts
from chatmill.trainer.chat.serve.jobs import Done, Event, Job, Piece
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.generation.generation import Generation
from chatmill.trainer.generation.prefix_store import PrefixStore, shared
from chatmill.trainer.model.decoder import Decoder


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_bpe(iter(["hello there, how are you? I am fine."] * 20), 300)


@pytest.fixture(scope="module")
def model(tokenizer: ChatTokenizer) -> Decoder:
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 512}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    model.init_weights(3)
    return model.eval().requires_grad_(False)


def over(model: Decoder, prompt: list[int], new: int) -> Generation:
    steps = Generation(model, prompt, max_new_tokens=new)
    list(steps)
    return steps


def test_the_next_turn_reads_only_what_is_new_and_gives_the_same_reply(model: Decoder) -> None:
    first = [(7 * i) % 250 for i in range(60)]
    store = PrefixStore(512)
    done = over(model, first, 10)
    assert done.read_ids == first + done.ids[:-1]  # the last token was chosen, never read
    store.keep(done)
    prompt = first + done.ids + [5, 6, 7]
    turn = Generation(model, prompt, max_new_tokens=20)
    assert store.lend(turn) == 69
    assert turn.pending.tolist() == prompt[69:]
    logits = turn.read()
    whole = Generation(model, prompt, max_new_tokens=20)
    torch.testing.assert_close(logits, whole.read())
    torch.testing.assert_close(turn.cache.k[:, :, : len(prompt)], whole.cache.k[:, :, : len(prompt)])
    again = Generation(model, prompt, max_new_tokens=20)
    store.lend(again)
    assert [s.id for s in again] == [step.id for step in Generation(model, prompt, max_new_tokens=20)]


def test_a_branch_shares_its_beginning_and_a_stranger_nothing(model: Decoder) -> None:
    first = [(7 * i) % 250 for i in range(60)]
    store = PrefixStore(512)
    store.keep(over(model, first, 4))
    branch = first[:50] + [1] * 30
    assert store.lend(steps := Generation(model, branch, max_new_tokens=8)) == 50
    assert [s.id for s in steps] == [step.id for step in Generation(model, branch, max_new_tokens=8)]
    assert store.lend(Generation(model, first, max_new_tokens=8)) == 59  # one token is always read: its logits are wanted
    assert store.lend(Generation(model, first[:20] + [1] * 30, max_new_tokens=8)) == 0  # not worth a copy
    scored = Generation(model, branch, max_new_tokens=1, prompt_logprobs=0)
    store.lend(scored)
    list(scored)
    assert len(scored.prompt_steps) == len(branch) - 1


def test_the_store_stays_within_its_tokens_and_drops_the_least_recently_used(model: Decoder) -> None:
    store = PrefixStore(100)
    a, b, c = ([start] * 40 for start in (1, 2, 3))
    store.keep(over(model, a, 1))
    store.keep(over(model, b, 1))
    assert store.lend(Generation(model, a, max_new_tokens=1)) == 39  # a was used after b now
    store.keep(over(model, c, 1))
    assert store.tokens == 80
    assert [store.lend(Generation(model, p, max_new_tokens=1)) for p in (a, b, c)] == [39, 0, 39]
    store.keep(over(model, a + [9] * 10, 1))  # goes on from a: in its place
    assert store.tokens == 90
    store.keep(over(model, [4] * 101, 1))  # larger than all there is
    assert store.tokens == 90
    store.clear()
    assert store.tokens == 0


def test_shared_beginnings_are_counted_in_tokens() -> None:
    assert [shared(*pair) for pair in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 5, 3]))] == [0, 2, 1]


def test_prompts_get_a_bounded_share_of_a_step_in_order_of_arrival() -> None:
    assert shares_of_prompts([1, 200, 1, 100, 30]) == [0, 200, 0, 56, 0]
    assert shares_of_prompts([2000, 5]) == [1024, 0]
    assert shares_of_prompts([20, 30]) == [20, 30]
    assert shares_of_prompts([1, 1]) == [0, 0]


def run_jobs(batcher: Batcher, prompts: list[list[int]], new: int) -> list[tuple[int, Event]]:
    """Events of all replies as they came; each job is submitted by the first event of the one before it."""
    events: list[tuple[int, Event]] = []
    ended = threading.Event()

    def submit(index: int) -> None:
        def emit(event: Event) -> None:
            events.append((index, event))
            if index + 1 < len(prompts) and sum(i == index for i, _ in events) == 1:
                submit(index + 1)
            if sum(not isinstance(e, Piece) for _, e in events) == len(prompts):
                ended.set()

        batcher.submit(Job(prompts[index], new, emit))

    submit(0)
    assert ended.wait(600)
    return events


def ids_of(events: list[tuple[int, Event]], index: int) -> list[int]:
    return [step.id for i, event in events if i == index and isinstance(event, Piece) for step in event.steps]


def test_a_long_prompt_does_not_hold_up_a_reply_in_progress(
    model: Decoder, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STRETCH", 16)
    chat = ChatModel(model, tokenizer, Path("tiny"), "tiny")
    short, long = tokenizer.encode("hello there"), [(7 * i) % 250 for i in range(400)]
    batcher = Batcher(chat)
    events = run_jobs(batcher, [short, long], 60)
    batcher.close()
    stops = tokenizer.stop_ids
    for index, prompt in enumerate((short, long)):
        assert ids_of(events, index) == [step.id for step in Generation(model, prompt, max_new_tokens=60, stop_ids=stops)]
    waited = events[: next(at for at, (i, _) in enumerate(events) if i == 1)]
    assert len(ids_of(waited, 0)) >= 20  # 400 tokens in stretches of 16 take 25 steps


def test_the_batcher_reuses_the_turn_before(model: Decoder, tokenizer: ChatTokenizer) -> None:
    turns = [{"role": "user", "content": "hello there, how are you? I am fine. hello there, how are you?"}]
    prompt, stops = tokenizer.prompt_ids(turns), tokenizer.stop_ids
    for keep, reused in ((None, len(prompt)), (0, 0)):
        batcher = Batcher(ChatModel(model, tokenizer, Path("tiny"), "tiny"), keep_tokens=keep)
        events = run_jobs(batcher, [prompt], 12)
        assert isinstance(events[-1][1], Done)
        following = prompt + ids_of(events, 0) + tokenizer.encode(" and you?")
        answer = ids_of(run_jobs(batcher, [following], 20), 0)
        batcher.close()
        assert answer == [step.id for step in Generation(model, following, max_new_tokens=20, stop_ids=stops)]
        assert batcher.counts.reused_tokens >= reused if reused else batcher.counts.reused_tokens == 0
