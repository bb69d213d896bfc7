"""Choosing the next token: pure functions from logits to one id.

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

The order and the meaning of every knob are those of transformers, so settings carry over.
Temperature 0 is greedy: the penalty still applies, the filters cannot change the answer.

Shapes: logits Float["V"], V = vocabulary.
Sources: top-p, Holtzman et al., arXiv:1904.09751; min-p, Nguyen et al., arXiv:2407.01082;
repetition penalty, Keskar et al., arXiv:1909.05858.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample the next token. None switches a filter off.

    temperature: 0 takes the most likely token; 1 samples from the model's own distribution.
    top_k: sample from the k most likely tokens.  top_p: from the fewest tokens whose probabilities add up to top_p.
    min_p: from the tokens at least this fraction as likely as the most likely one.
    repetition_penalty: > 1 makes tokens seen in the prompt or the reply less likely; 1 is off.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature}: expected a finite number >= 0; 0 is greedy, 0.7 is usual for chat."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: expected an integer >= 1; leave it out to switch the filter off.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected 0 < top_p <= 1; leave it out to switch the filter off.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: expected 0 <= min_p <= 1; leave it out to switch the filter off.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: expected a finite number > 0; 1 switches it off.")


def make_generator(seed: int | None, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator of its own; seed None takes a fresh seed from the operating system."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator


def penalise_repeats(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of the ids in `seen` (Int64["n"], any order) by penalty."""
    if penalty == 1.0 or seen.numel() == 0:
        return logits
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """-inf below the k-th largest logit; ties with it stay."""
    if k is None or k >= logits.numel():
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


def filtered_logits(logits: Tensor, sampling: Sampling, seen: Tensor) -> Tensor:
    """Logits after the penalty, temperature and filters. Temperature must be above 0."""
    logits = penalise_repeats(logits, seen, sampling.repetition_penalty) / sampling.temperature
    return keep_min_p(keep_top_p(keep_top_k(logits, sampling.top_k), sampling.top_p), sampling.min_p)


def next_token(logits: Tensor, sampling: Sampling, seen: Tensor, generator: torch.Generator) -> int:
    """One id drawn from logits Float["V"]; `seen` holds the ids that the repetition penalty counts.

    Raises FloatingPointError when the logits hold a NaN or nothing but -inf: a damaged model must not answer silently.
    """
    if not torch.isfinite(logits.max()):  # max() is NaN if any entry is
        raise FloatingPointError("the model's logits hold NaN or infinity; check the checkpoint's weights and the precision.")
    if sampling.temperature == 0.0:
        return int(penalise_repeats(logits, seen, sampling.repetition_penalty).argmax())
    chances = filtered_logits(logits.float(), sampling, seen).softmax(-1)
    return int(torch.multinomial(chances, 1, generator=generator))
