"""Choosing the next token: pure functions from logits to one id.

    rules of the reply (rules.py) -> temperature -> top-k -> top-p -> min-p -> draw

The order and the meaning of every knob are those of transformers, so settings carry over.
Temperature 0 is greedy: the rules still apply, the filters cannot change the answer.

Shapes: logits Float["V"], V = vocabulary.
Sources: top-p, Holtzman et al., arXiv:1904.09751; min-p, Nguyen et al., arXiv:2407.01082;
repetition penalty, Keskar et al., arXiv:1909.05858.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLDEST, HOTTEST = 1e-30, 1e30  # beyond them fp32 holds neither the temperature nor its inverse; the draw is the same
SEEDS = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample the next token. None switches a filter off.

    temperature: 0 takes the most likely token; 1 samples from the model's own distribution.
    top_k: sample from the k most likely tokens; 0 and -1 are off, too.
    top_p: from the fewest tokens whose probabilities add up to top_p.
    min_p: from the tokens at least this fraction as likely as the most likely one.
    repetition_penalty: > 1 makes tokens seen in the prompt or the reply less likely; 1 is off.
    presence_penalty: subtracted from the logit of every token of the reply so far; frequency_penalty: for each time it came.
    logit_bias: (id, value to add to its logit) pairs.
    min_tokens: neither a stop id nor a stop string ends the reply before it has this many tokens.
    stop_token_ids: end the reply like the tokenizer's own stop ids; ignore_eos: those own ones do not end it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        off = "leave it out to switch the filter off"
        self._check("temperature", lambda x: 0 <= x < math.inf, "a finite number >= 0; 0 is greedy, 0.7 is usual for chat")
        self._check("top_k", lambda x: x >= -1, f"an integer >= 1; 0, -1 or {off}", whole=True)
        self._check("top_p", lambda x: 0 < x <= 1, f"0 < top_p <= 1; {off}")
        self._check("min_p", lambda x: 0 <= x <= 1, f"0 <= min_p <= 1; {off}")
        self._check("repetition_penalty", lambda x: 0.01 <= x <= 100, "0.01 to 100; 1 switches it off")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, lambda x: -2 <= x <= 2, "-2 to 2; 0 switches it off")
        self._check("min_tokens", lambda x: x >= 0, "an integer >= 0", whole=True)
        for i, value in self.logit_bias:
            if not _is_number(i, whole=True) or i < 0 or not _is_number(value) or not -100 <= value <= 100:
                raise ValueError(f"logit_bias={i!r}: {value!r}: expected token ids with values from -100 to 100.")
        for i in self.stop_token_ids:
            if not _is_number(i, whole=True) or i < 0:
                raise ValueError(f"stop_token_ids={i!r}: expected token ids.")

    def _check(self, name: str, fits: Any, expected: str, *, whole: bool = False) -> None:
        value = getattr(self, name)
        if value is not None and not (_is_number(value, whole=whole) and fits(value)):
            raise ValueError(f"{name}={value!r}: expected {expected}.")

    def stop_ids(self, own: Collection[int]) -> frozenset[int]:
        """The ids that end a reply. own: the tokenizer's."""
        return frozenset(() if self.ignore_eos else own) | frozenset(self.stop_token_ids)

    def check_against(self, vocab_size: int, *, with_grammar: bool) -> None:
        """Raise ValueError for an id that the model does not have, and for what contradicts a grammar."""
        for name, ids in (("logit_bias", [i for i, _ in self.logit_bias]), ("stop_token_ids", self.stop_token_ids)):
            if wrong := [i for i in ids if i >= vocab_size]:
                raise ValueError(f"{name}: token id {wrong[0]} is not one of this model, which has 0..{vocab_size - 1}.")
        if with_grammar and (self.min_tokens or self.ignore_eos):
            name = "min_tokens" if self.min_tokens else "ignore_eos"
            raise ValueError(f"{name}: a reply in JSON ends where the JSON ends; leave it out.")


def _is_number(value: Any, *, whole: bool = False) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def check_seed(seed: int | None) -> None:
    """Raise ValueError for a seed beyond 64 bits."""
    if seed is not None and not (_is_number(seed, whole=True) and SEEDS[0] <= seed <= SEEDS[1]):
        raise ValueError(f"seed={seed!r}: expected an integer from {SEEDS[0]} to {SEEDS[1]}.")


def make_generator(seed: int | None, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator of its own; seed None takes a fresh seed from the operating system."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        seed %= 2**64
        # torch's CPU generator reads 32 bits: the upper ones are folded in, so that two seeds do not mean the same.
        generator.manual_seed(seed ^ ((seed >> 32) * 0x9E3779B1 & 0xFFFFFFFF))
    return generator


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """-inf below the k-th largest logit; ties with it stay."""
    if k is None or k <= 0 or k >= logits.numel():
        return logits
    return logits.masked_fill(logits < torch.topk(logits, k).values[-1], -math.inf)


def keep_top_p(logits: Tensor, p: float | None) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose probability reaches p; one token always stays."""
    if p is None or p >= 1.0:
        return logits
    ordered, order = torch.sort(logits, descending=False)
    outside = ordered.softmax(-1).cumsum(-1) <= 1.0 - p
    outside[-1] = False
    return logits.masked_fill(torch.zeros_like(outside).index_copy(0, order, outside), -math.inf)


def keep_min_p(logits: Tensor, p: float | None) -> Tensor:
    """-inf where the probability is below p times the largest one."""
    if p is None or p == 0.0:
        return logits
    return logits.masked_fill(logits < logits.max() + math.log(p), -math.inf)


def filtered_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits after temperature and filters. Temperature must be above 0."""
    if sampling.temperature < 0.01:  # the largest logit becomes 0: divided by so little, all others may overflow
        logits = logits - logits.max()
    logits = logits / min(max(sampling.temperature, COLDEST), HOTTEST)
    return keep_min_p(keep_top_p(keep_top_k(logits, sampling.top_k), sampling.top_p), sampling.min_p)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id drawn from logits Float["V"], to which the rules of the reply have been applied."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    chances = filtered_logits(logits.float(), sampling).softmax(-1)
    return int(torch.multinomial(chances, 1, generator=generator))
