"""The rules of a reply: against their formulas, at the edges of numbers, and beside neighbours with other rules."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from chatmill.config import ConfigError
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.generation.batched import next_steps
from chatmill.trainer.generation.generation import Generation
from chatmill.trainer.generation.grammar import Grammars
from chatmill.trainer.generation.rules import Rules
from chatmill.trainer.generation.sampling import Sampling, check_seed, filtered_logits, make_generator, next_token
from chatmill.trainer.model.decoder import Decoder

CPU = torch.device("cpu")
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_bpe(iter(["hello there, how are you? I am fine. 你好吗"] * 20), 300)


def make_model(tokenizer: ChatTokenizer, extra: int = 0) -> Decoder:
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 256}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size + extra, initializer_range=0.3, **shape))
    model.init_weights(1)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer: ChatTokenizer) -> Decoder:
    return make_model(tokenizer)


def reply(model: Decoder, prompt: list[int], new: int = 20, **options: Any) -> list[int]:
    return [step.id for step in Generation(model, prompt, max_new_tokens=new, **options)]


def test_presence_and_frequency_are_subtracted_for_tokens_of_the_reply_alone() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rules = Rules(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [3], (), 4, CPU)
    for token in (1, 1, 2):
        rules.note(token)
    assert rules.apply(logits).tolist() == [1.0, 2.0 - 0.5 - 2 * 0.25, 3.0 - 0.5 - 0.25, 4.0]


def test_a_bias_forces_and_forbids_tokens(model: Decoder) -> None:
    free = reply(model, [5, 6], 8)
    assert reply(model, [5, 6], 8, sampling=Sampling(logit_bias=((77, 100.0),))) == [77] * 8
    assert free[0] not in reply(model, [5, 6], 8, sampling=Sampling(logit_bias=((free[0], -100.0),)))


def test_penalties_make_a_reply_repeat_itself_less(model: Decoder) -> None:
    stuck = Sampling(logit_bias=((70, 6.0), (71, 5.5)))
    plain = reply(model, [5, 6], 30, sampling=stuck)
    for knob in ("presence_penalty", "frequency_penalty"):
        freer = reply(model, [5, 6], 30, sampling=Sampling(logit_bias=stuck.logit_bias, **{knob: 2.0}))
        assert len(set(freer)) > len(set(plain))


def test_no_stop_id_comes_before_min_tokens(model: Decoder) -> None:
    eager = {"logit_bias": ((9, 50.0),)}
    assert reply(model, [5, 6], 20, sampling=Sampling(**eager), stop_ids={9}) == []
    steps = Generation(model, [5, 6], max_new_tokens=20, sampling=Sampling(**eager, min_tokens=7), stop_ids={9})
    assert len([step.id for step in steps]) == 7 and 9 not in steps.ids and steps.finish_reason == "stop"


def test_stop_ids_are_added_and_the_own_ones_can_be_ignored(model: Decoder) -> None:
    free = reply(model, [5, 6], 20)
    own, other = free[6], free[3]
    assert reply(model, [5, 6], 20, stop_ids={own}) == free[: free.index(own)]
    added = Sampling(stop_token_ids=(other,))
    assert reply(model, [5, 6], 20, stop_ids={own}, sampling=added) == free[: min(free.index(other), free.index(own))]
    assert reply(model, [5, 6], 20, stop_ids={own}, sampling=Sampling(ignore_eos=True)) == free
    both = Sampling(ignore_eos=True, stop_token_ids=(other,))
    assert reply(model, [5, 6], 20, stop_ids={own}, sampling=both) == free[: free.index(other)]


def test_ids_that_the_model_does_not_have_are_refused(model: Decoder) -> None:
    for knobs in ({"logit_bias": ((999, 1.0),)}, {"stop_token_ids": (999,)}):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}: token id 999"):
            Generation(model, [5], max_new_tokens=1, sampling=Sampling(**knobs))


MIXED = [
    {},
    {"temperature": 1.2, "top_k": 30},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 2.0, "temperature": 0.7},
    {"frequency_penalty": 1.5},
    {"logit_bias": ((40, 9.0), (41, -100.0)), "temperature": 1e-40},
    {"min_tokens": 12, "logit_bias": ((9, 9.0),)},
    {"ignore_eos": True, "top_p": 0.3, "temperature": 2.0},
    {"stop_token_ids": (40, 41, 42, 43)},
]


def test_neighbours_in_a_batch_do_not_feel_each_others_rules(model: Decoder) -> None:
    def start(k: int) -> Generation:
        return Generation(model, [5, 6, 7 + k], max_new_tokens=20, sampling=Sampling(**MIXED[k]), stop_ids={9}, seed=k)

    alone = [[step.id for step in start(k)] for k in range(len(MIXED))]
    for order in (range(len(MIXED)), reversed(range(len(MIXED)))):
        running = {k: start(k) for k in order}
        while any(not g.is_over for g in running.values()):
            next_steps(model, list(running.values()))
        assert [running[k].ids for k in range(len(MIXED))] == alone


# -- edges of numbers


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-30, 1e-6, 1e-3])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature: float) -> None:
    for logits in (torch.tensor([-3.0, 1.5, 1.0, -math.inf]), torch.tensor([-3e38, -1e30, -1e31, -3e38])):
        chances = filtered_logits(logits, Sampling(temperature)).softmax(-1)
        assert chances.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1.7e308])
def test_a_huge_temperature_draws_evenly_among_what_is_allowed(temperature: float) -> None:
    chances = filtered_logits(torch.tensor([-3.0, 90.0, -math.inf]), Sampling(temperature)).softmax(-1)
    assert chances.tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-3)


@pytest.mark.parametrize(
    "knobs",
    [
        {"top_p": 5e-324},
        {"top_p": 1e-40},
        {"top_p": 1.0},
        {"min_p": 5e-324},
        {"min_p": 1.0},
        {"min_p": 0.0},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": 10**30},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100},
        {"logit_bias": ((0, -100.0), (1, -100.0), (2, -100.0))},
    ],
)
def test_extreme_but_valid_knobs_give_a_token(knobs: dict[str, Any]) -> None:
    logits = torch.tensor([1e4, -1e4, 3.0])
    for temperature in (0.0, 1e-40, 1.0, 1e300):
        sampling = Sampling(temperature, **knobs)
        assert next_token(Rules(sampling, [0, 1], (), 3, CPU).apply(logits), sampling, make_generator(0)) in (0, 1, 2)


def test_top_k_zero_and_minus_one_are_off() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    for off in (0, -1, None):
        assert torch.equal(filtered_logits(logits, Sampling(1.0, off)), logits)


def test_every_seed_of_64_bits_is_its_own_and_beyond_is_refused() -> None:
    def draw(seed: int) -> list[float]:
        return torch.rand(4, generator=make_generator(seed)).tolist()

    seeds = [0, 5, 5 + 2**32, 5 + 2**40, 2**63 - 1, -1, -(2**63)]
    assert len({tuple(draw(seed)) for seed in seeds}) == len(seeds)
    assert draw(5) == torch.rand(4, generator=torch.Generator().manual_seed(5)).tolist()  # small seeds mean what torch's do
    for seed in (2**63, -(2**63) - 1, True, 1.0, "1"):
        with pytest.raises(ValueError, match="seed"):
            check_seed(seed)  # type: ignore[arg-type]


# -- grammars


def byte_fallback(prefix: bool) -> ChatTokenizer:
    """Llama 2's kind (prefix) or Gemma's: bytes where the vocabulary has no letter."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for letter in "▁abcdefghijklmnopqrstuvwxyz.,!?:'\n[]{}\"/<|>0123456789":
        vocab.setdefault(letter, len(vocab))
    merges = [("▁", "t"), ("▁t", "h"), ("{", '"')]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    made.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<unk>", "<s>", "</s>")])
    return ChatTokenizer(made.to_str(), ZEPHYR, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("kind", ["byte-level", "llama2", "gemma"])
def test_replies_under_a_schema_are_json_that_it_accepts(kind: str, tokenizer: ChatTokenizer) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `serve`")
    chosen = tokenizer if kind == "byte-level" else byte_fallback(kind == "llama2")
    model = make_model(chosen, extra=7)  # rows that no token has
    grammar = Grammars(chosen, model.config.vocab_size).json(PERSON)
    for seed in range(3):
        steps = Generation(
            model,
            [5, 6],
            max_new_tokens=200,
            sampling=Sampling(1.5),
            stop_ids=chosen.stop_ids,
            seed=seed,
            grammar=grammar.copy(),
        )
        found = json.loads(chosen.decode([step.id for step in steps]))
        assert steps.finish_reason == "stop"
        assert set(found) == {"name", "age"} and len(found["name"]) <= 5 and 0 <= found["age"] <= 99


def test_rows_with_and_without_a_grammar_share_a_batch(model: Decoder, tokenizer: ChatTokenizer) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `serve`")
    grammars = Grammars(tokenizer, model.config.vocab_size)
    first = grammars.json(PERSON)

    def start(k: int) -> Generation:
        grammar = (None, first.copy(), grammars.json())[k % 3]
        return Generation(
            model,
            [5, 6, 7 + k],
            max_new_tokens=24,
            sampling=Sampling(1.0),
            stop_ids=tokenizer.stop_ids,
            seed=k,
            grammar=grammar,
        )

    alone = [[step.id for step in start(k)] for k in range(6)]
    running = [start(k) for k in range(6)]
    while any(not g.is_over for g in running):
        next_steps(model, running)
    assert [g.ids for g in running] == alone


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "weird"}, "weird"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"x-guidance": {"lenient": True}, "properties": {"a": {"not": {}}}}, "not"),
        ({"type": 5}, "type"),
        ({"$ref": "#"}, "refers to itself"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(tokenizer: ChatTokenizer, schema: dict[str, Any], word: str) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `serve`")
    with pytest.raises(ConfigError, match=word):
        Grammars(tokenizer, 300).json(schema)


def test_a_grammar_without_its_library_is_refused_in_words(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install"):
        Grammars(tokenizer, 300).json()


def test_what_contradicts_a_grammar_is_refused(model: Decoder, tokenizer: ChatTokenizer) -> None:
    for knobs in ({"min_tokens": 3}, {"ignore_eos": True}):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            Sampling(**knobs).check_against(300, with_grammar=True)
