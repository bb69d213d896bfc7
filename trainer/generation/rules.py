"""What a request changes about the model's logits before a token is chosen: one object per reply.

    rules = Rules(sampling, prompt_ids, stop_ids, vocab_size, device, grammar)
    chosen = next_token(rules.apply(logits), sampling, generator);  rules.note(chosen)

    repetition penalty -> presence and frequency penalty -> logit bias -> no stop id before min_tokens -> grammar

`chatmill chat`, `generate` and `serve` all come through here. The repetition penalty is that of transformers and counts prompt
and reply; presence and frequency are those of the OpenAI API and count the reply, as vLLM does. What a grammar or min_tokens
forbids stays forbidden, whatever the bias.

Shapes: logits Float["V"], V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .grammar import Grammar
from .sampling import Sampling


class Rules:
    """The rules of one reply and what they must remember of it. grammar: of this reply alone; it advances with `note`."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        stop_ids: Collection[int],
        vocab_size: int,
        device: torch.device,
        grammar: Grammar | None = None,
    ) -> None:
        self._sampling, self.grammar = sampling, grammar
        self._length = 0
        self._seen_ids = set(prompt_ids)  # on the host: torch.unique would make it wait for the GPU
        self._seen = _ids(sorted(self._seen_ids), device)
        self._counts: Tensor | None = None  # Float["V"]: how often each token came in the reply
        if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
            self._counts = torch.zeros(vocab_size, device=device)
        self._stops = _ids(sorted(stop_ids), device)
        self._biased = _ids([i for i, _ in sampling.logit_bias], device)
        self._bias = torch.tensor([value for _, value in sampling.logit_bias], dtype=torch.float32, device=device)

    def apply(self, logits: Tensor) -> Tensor:
        """Logits Float["V"] after all rules; -inf for what is forbidden.

        Raises FloatingPointError when the logits hold a NaN or nothing but -inf: a damaged model must not answer silently.
        """
        if not torch.isfinite(logits.max()):  # max() is NaN if any entry is
            raise FloatingPointError(
                "the model's logits hold NaN or infinity; check the checkpoint's weights and the precision."
            )
        sampling = self._sampling
        logits = penalise_repeats(logits, self._seen, sampling.repetition_penalty)
        if self._counts is not None:
            logits = penalise_counts(logits, self._counts, sampling.presence_penalty, sampling.frequency_penalty)
        if len(self._biased):
            logits = logits.index_add(0, self._biased, self._bias.to(logits.dtype))
        if self._length < sampling.min_tokens and len(self._stops):
            logits = logits.index_fill(0, self._stops, -math.inf)
        if self.grammar is not None:
            logits = logits.masked_fill(~self.grammar.allowed(logits.numel()).to(logits.device), -math.inf)
        return logits

    def note(self, chosen: int) -> None:
        """Remember a token of the reply."""
        self._length += 1
        if self._sampling.repetition_penalty != 1.0 and chosen not in self._seen_ids:
            self._seen_ids.add(chosen)
            self._seen = torch.cat((self._seen, _ids([chosen], self._seen.device)))
        if self._counts is not None:
            self._counts[chosen] += 1
        if self.grammar is not None:
            self.grammar.accept(chosen)

    @property
    def is_complete(self) -> bool:
        """The grammar allows nothing more."""
        return self.grammar is not None and self.grammar.is_complete


def penalise_repeats(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of the ids in `seen` (Int64["n"], any order) by penalty."""
    if penalty == 1.0 or seen.numel() == 0:
        return logits
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def penalise_counts(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """logits - frequency * counts - presence where counts > 0. counts Float["V"]."""
    return (logits.float() - frequency * counts - presence * (counts > 0)).to(logits.dtype)


def _ids(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=device)
