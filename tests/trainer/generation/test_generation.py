"""Generation against transformers, sampling against transformers' warpers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.generation import logits_process

from chatmill.config import ConfigError
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, open_checkpoint
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.convert.hf import export_hf, import_hf
from chatmill.trainer.generation.batched import next_steps
from chatmill.trainer.generation.generation import Generation
from chatmill.trainer.generation.prompt import Prompt, fit_messages
from chatmill.trainer.generation.replies import replies_to_many, reply_to
from chatmill.trainer.generation.rules import Rules, penalise_repeats
from chatmill.trainer.generation.sampling import Sampling, filtered_logits, make_generator, next_token
from chatmill.trainer.model.decoder import Decoder

TEXT = "Zoë says: 你好 👩‍👩‍👧 naïve\n```py\nx = 1\n```"


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_bpe(iter(["hello there, how are you? I am fine.", TEXT] * 20), 300)


@pytest.fixture(scope="module")
def model(tokenizer: ChatTokenizer) -> Decoder:
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 96}
    decoder = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    decoder.init_weights(1)
    return decoder.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder]:
    """The same random weights in transformers and here; wide enough apart that greedy choices never tie."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.4)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "ours")
    checkpoint = open_checkpoint(folder / "ours")
    ours = Decoder(checkpoint.config)
    checkpoint.load_into(ours)
    return theirs, ours.eval()


def their_reply(theirs: Any, prompt: list[int], new: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)  # transformers would guess one from the pad id
    out = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(pair: tuple[Any, Decoder], penalty: float) -> None:
    theirs, ours = pair
    for start in range(4):
        prompt = [(7 * i + 13 * start) % 97 for i in range(3 + 5 * start)]
        expected = their_reply(theirs, prompt, 30, repetition_penalty=penalty)
        assert [
            step.id for step in Generation(ours, prompt, max_new_tokens=30, sampling=Sampling(repetition_penalty=penalty))
        ] == expected
        assert len(set(expected)) > 5


def test_a_prompt_read_in_chunks_gives_the_same_reply(pair: tuple[Any, Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [(5 * i) % 97 for i in range(50)]
    whole = [step.id for step in Generation(pair[1], prompt, max_new_tokens=20)]
    monkeypatch.setattr("chatmill.trainer.generation.generation.PREFILL_CHUNK", 7)
    assert [step.id for step in Generation(pair[1], prompt, max_new_tokens=20)] == whole


def test_log_probabilities_are_those_of_a_full_forward_pass(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    prompt = [3, 1, 4, 1, 5]
    steps = list(Generation(ours, prompt, max_new_tokens=12, logprobs=3))
    ids = prompt + [step.id for step in steps]
    with torch.no_grad():
        truth = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    for at, step in enumerate(steps, len(prompt) - 1):
        assert step.logprob == pytest.approx(float(truth[at, step.id]), abs=1e-4)
        best = truth[at].topk(3)
        assert [i for i, _ in step.top] == best.indices.tolist()
        assert [p for _, p in step.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_stop_id_ends_a_reply_and_is_not_part_of_it(pair: tuple[Any, Decoder]) -> None:
    free = [step.id for step in Generation(pair[1], [9, 8, 7], max_new_tokens=30)]
    stop = free[6]
    steps = Generation(pair[1], [9, 8, 7], max_new_tokens=30, stop_ids={stop})
    assert [step.id for step in steps] == free[: free.index(stop)]
    assert steps.finish_reason == "stop"


def test_a_reply_ends_where_the_context_is_full(model: Decoder) -> None:
    steps = Generation(model, [5] * 90, max_new_tokens=50)
    assert len(list(steps)) == 6
    assert steps.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "word"), [([], "empty"), ([1] * 96, "context is 96"), ([1, 999], "999"), ([-1], "token id -1")]
)
def test_an_impossible_prompt_is_refused_in_words(model: Decoder, prompt: list[int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Generation(model, prompt, max_new_tokens=5)


def test_the_same_seed_repeats_a_reply_and_another_does_not(model: Decoder) -> None:
    def reply(seed: int) -> list[int]:
        return [step.id for step in Generation(model, [1, 2, 3], max_new_tokens=40, sampling=Sampling(1.5), seed=seed)]

    assert reply(7) == reply(7) != reply(8)


# -- many at once


@pytest.mark.parametrize(
    "extra", [{}, {"qk_norm": True, "sliding_window": 8, "tied_embeddings": False}, {"logit_softcap": 9.0}]
)
def test_replies_made_together_are_those_made_alone(extra: dict[str, Any]) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 3, "heads": 4, "kv_heads": 2, "context": 64}
    model = Decoder(ModelConfig(vocab_size=97, initializer_range=0.4, **shape, **extra))
    model.init_weights(2)
    prompts = [[(5 * i + k) % 97 for i in range(2 + 7 * k)] for k in range(6)]
    lengths = (3, 40, 17, 1, 60, 25)

    def start(k: int) -> Generation:
        knobs = Sampling(0.0) if k % 2 else Sampling(0.9, top_k=20, repetition_penalty=1.1)
        return Generation(model, prompts[k], max_new_tokens=lengths[k], sampling=knobs, seed=k, logprobs=1)

    alone = [list(start(k)) for k in range(6)]
    generations = [start(k) for k in range(6)]
    together: list[list[Any]] = [[] for _ in generations]
    for turn in range(200):
        joined = [k for k in range(6) if turn >= 2 * k]  # they arrive one after another
        for k, step in zip(joined, next_steps(model, [generations[k] for k in joined]), strict=True):
            together[k] += [step] if step is not None else []
    assert [[s.id for s in steps] for steps in together] == [[s.id for s in steps] for steps in alone]
    for mine, theirs in zip(together, alone, strict=True):
        assert [s.logprob for s in mine] == pytest.approx([s.logprob for s in theirs], abs=1e-4)
    assert {g.finish_reason for g in generations} == {"length"}


# -- text


def test_generation_stops_at_a_stop_string(model: Decoder, tokenizer: ChatTokenizer) -> None:
    prompt = tokenizer.encode("hello")
    ids = [step.id for step in Generation(model, prompt, max_new_tokens=40)]
    text = tokenizer.decode(ids)
    stop = text[8:11]
    ((_, reply),) = replies_to_many(model, tokenizer, [Prompt(prompt, 40, Sampling(), stops=[stop])])
    assert reply.finish_reason == "stop" and reply.text == text[: text.index(stop)]
    cut = ids[: reply.tokens]
    assert stop in tokenizer.decode(cut)
    assert stop not in tokenizer.decode(cut[:-1])


def test_reply_to_streams_what_it_returns(model: Decoder, tokenizer: ChatTokenizer) -> None:
    pieces: list[str] = []
    messages = [{"role": "user", "content": "hello"}]
    reply = reply_to(model, tokenizer, messages, max_new_tokens=30, on_text=pieces.append)
    assert "".join(pieces) == reply.text
    assert reply.prompt_tokens == len(tokenizer.prompt_ids(messages))
    assert 0 < reply.tokens <= 30


def test_a_long_conversation_loses_its_oldest_turns_but_not_the_system_message(tokenizer: ChatTokenizer) -> None:
    turns = [{"role": role, "content": f"{k} hello there"} for k in range(6) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "fine"}, *turns, {"role": "user", "content": "last"}]
    whole = len(tokenizer.prompt_ids(messages))
    ids, dropped = fit_messages(tokenizer, messages, context=whole, reserve=20)
    assert dropped and dropped % 2 == 0
    assert ids == tokenizer.prompt_ids([messages[0], *messages[1 + dropped :]])
    assert len(ids) <= whole - 20
    assert fit_messages(tokenizer, messages, context=whole + 20, reserve=20) == (tokenizer.prompt_ids(messages), 0)
    with pytest.raises(ConfigError, match="Shorten"):
        fit_messages(tokenizer, [{"role": "user", "content": "hello " * 50}], context=60, reserve=10)


# -- sampling


def test_filters_and_penalty_are_those_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(200, generator=generator) * 4
        seen = torch.randint(0, 200, (30,), generator=generator)
        theirs = logits_process.RepetitionPenaltyLogitsProcessor(1.4)(seen[None], logits[None].clone())
        theirs = logits_process.TemperatureLogitsWarper(0.7)(seen[None], theirs)
        theirs = logits_process.TopKLogitsWarper(40)(seen[None], theirs)
        theirs = logits_process.TopPLogitsWarper(0.9)(seen[None], theirs)
        theirs = logits_process.MinPLogitsWarper(0.05)(seen[None], theirs)
        ours = filtered_logits(penalise_repeats(logits, torch.unique(seen), 1.4), Sampling(0.7, 40, 0.9, 0.05))
        assert torch.allclose(ours, theirs[0], atol=1e-5)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    generator = make_generator(3)
    draws = [next_token(logits, Sampling(1.0), generator) for _ in range(4000)]
    shares = [draws.count(i) / 4000 for i in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def chosen(logits: torch.Tensor, sampling: Sampling, prompt: list[int]) -> int:
    rules = Rules(sampling, prompt, (), len(logits), logits.device)
    return next_token(rules.apply(logits), sampling, make_generator(0))


def test_greedy_still_honours_the_penalty() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert chosen(logits, Sampling(), []) == 0
    assert chosen(logits, Sampling(repetition_penalty=1.5), [0]) == 1
    assert penalise_repeats(logits, torch.tensor([2]), 2.0)[2] == -2.0


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": True},
        {"temperature": "0.5"},
        {"top_k": -2},
        {"top_k": 2.0},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": 2.0},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"logit_bias": ((3, math.inf),)},
        {"logit_bias": ((-1, 1.0),)},
        {"min_tokens": -1},
        {"min_tokens": True},
        {"stop_token_ids": (True,)},
    ],
)
def test_impossible_knobs_are_refused_by_name(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(knobs))):
        Sampling(**knobs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_damaged_logits_never_become_an_answer(bad: float) -> None:
    logits = torch.full((5,), bad) if bad < 0 else torch.tensor([1.0, bad, 0.0])
    for sampling in (Sampling(), Sampling(0.8)):
        with pytest.raises(FloatingPointError, match="logits"):
            chosen(logits, sampling, [])


@pytest.mark.slow
@pytest.mark.real_model
def test_greedy_replies_of_smollm2_are_those_of_transformers(smollm2: Checkpoint, tmp_path: Path) -> None:
    export_hf(smollm2, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = Decoder(smollm2.config)
    smollm2.load_into(ours)
    tokenizer = ChatTokenizer.load(smollm2.path)
    for question in ("What is the capital of France?", "Write one line of Python."):
        prompt = tokenizer.prompt_ids([{"role": "user", "content": question}])
        assert [step.id for step in Generation(ours.eval(), prompt, max_new_tokens=20)] == their_reply(theirs, prompt, 20)
    # prompts of different lengths, more of them than run at once
    questions = ["Hi!", "Name three rivers in Europe and say where each of them ends.", "What is 2 + 2?", "Who wrote Faust?"]
    asked = [Prompt(tokenizer.prompt_ids([{"role": "user", "content": q}]), 12, Sampling()) for q in questions]
    together = dict(replies_to_many(ours, tokenizer, asked, batch=3))
    for i, prompt in enumerate(asked):
        alone = [step.id for step in Generation(ours, prompt.ids, max_new_tokens=12, stop_ids=tokenizer.stop_ids)]
        assert (together[i].text, together[i].tokens) == (tokenizer.decode(alone), len(alone))
