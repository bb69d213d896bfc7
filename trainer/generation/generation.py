"""One reply token by token: read the prompt, choose, append to the KV cache, until a stop id or a limit.

    steps = Generation(model, prompt_ids, max_new_tokens=64, stop_ids=tokenizer.stop_ids)
    ids = [step.id for step in steps]           # the stop id is not among them
    steps.finish_reason                         # "stop" or "length"

Text: `chatmill.trainer.generation.text_stream`. Whole replies: `chatmill.trainer.generation.replies`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from chatmill.config import ConfigError

from ..model.language_model import LanguageModel
from ..model.variants import using
from .grammar import Grammar
from .prompt import check_prompt
from .rules import Rules
from .sampling import Sampling, make_generator, next_token

FinishReason = Literal["stop", "length"]
SCORE_CHUNK = 256  # tokens of a prompt whose logits exist at a time, where their log-probabilities are wanted
PREFILL_CHUNK = 1024  # tokens per forward pass of a prompt: bounds the memory of attention and MLP


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One generated token. logprob: natural log, of the model's own distribution before any sampling knob.

    top: the likeliest ids with their log-probabilities, best first (empty unless asked for).
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Generation:
    """Iterator over the TokenSteps of one reply. After the end, finish_reason tells why.

    "stop": a stop id came (stop_step is that token), the grammar allows nothing more, or the consumer called `stop()`;
    "length": max_new_tokens or the context is full. grammar: of this reply alone.
    prompt_logprobs: alternatives per token of the prompt; prompt_steps then has one TokenStep for each token but the first,
    which follows nothing.
    variant: of the model, where it has several (`chatmill.trainer.model.variants`).
    Closing it, or dropping it, ends the work: nothing runs between two `next` calls.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = frozenset(),
        seed: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        variant: int = 0,
    ) -> None:
        check_prompt(prompt_ids, model.config.context, model.config.vocab_size)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
        self.model, self.variant = model, variant
        self.sampling = sampling or Sampling()
        self.sampling.check_against(model.config.vocab_size, with_grammar=grammar is not None)
        self.stop_ids = self.sampling.stop_ids(stop_ids)
        self.finish_reason: FinishReason | None = None
        self.ids: list[int] = []
        self.stop_step: TokenStep | None = None
        self.prompt_steps: list[TokenStep] = []
        self._logprobs = logprobs
        self._prompt = list(prompt_ids)
        self._prompt_logprobs = prompt_logprobs
        self._room = min(max_new_tokens, model.config.context - len(prompt_ids))
        weight = next(model.parameters())
        self._device = weight.device
        kind = weight.device.type  # under autocast the keys come out in the autocast type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self._cache = model.new_cache(len(prompt_ids) + self._room, dtype, weight.device)
        self._pending = torch.tensor(list(prompt_ids), dtype=torch.long, device=weight.device)
        self._rules = Rules(self.sampling, prompt_ids, self.stop_ids, model.config.vocab_size, weight.device, grammar)
        self._generator = make_generator(seed, weight.device)

    def __iter__(self) -> Iterator[TokenStep]:
        return self

    def __next__(self) -> TokenStep:
        if self.is_over:
            raise StopIteration
        step = self.accept(self.read())
        if step is None:
            raise StopIteration
        return step

    @property
    def is_over(self) -> bool:
        """The reply is complete; finish_reason tells why."""
        if self.finish_reason is None and len(self.ids) >= self._room:
            self.finish_reason = "length"
        return self.finish_reason is not None

    @property
    def pending(self) -> Tensor:
        """Int64["n"]: tokens that the model has not read yet: the prompt at first, then one at a time."""
        return self._pending

    @property
    def cache(self) -> Any:
        """Keys and values of the tokens read so far."""
        return self._cache

    def accept(self, logits: Tensor) -> TokenStep | None:
        """Choose the next token from logits Float["V"]; None at a stop id. The pending tokens are in the cache by then."""
        chosen = next_token(self._rules.apply(logits), self.sampling, self._generator)
        if chosen in self.stop_ids:
            self.finish_reason = "stop"
            self.stop_step = token_step(chosen, logits, self._logprobs)
            return None
        self.ids.append(chosen)
        self._pending = torch.tensor([chosen], dtype=torch.long, device=self._device)
        self._rules.note(chosen)
        if self._rules.is_complete:
            self.finish_reason = "stop"
        return token_step(chosen, logits, self._logprobs)

    def stop(self) -> None:
        """End the reply from outside (a stop string was met)."""
        self.finish_reason = "stop"

    @property
    def read_ids(self) -> list[int]:
        """The tokens in the cache, in order."""
        return (self._prompt + self.ids)[: self._cache.length]

    def start_from(self, k: Tensor, v: Tensor) -> None:
        """Skip the first n tokens of the prompt, whose keys and values ["layers Hk n D"] are known. n < length of the prompt.

        Call it before anything is read. It does nothing where the prompt's tokens are scored: these must all be read.
        """
        count = k.shape[2]
        if self._cache.length or not 0 < count < len(self._prompt):
            raise ValueError(f"start_from: expected 1..{len(self._prompt) - 1} tokens before anything is read, got {count}.")
        if self._prompt_logprobs is not None:
            return
        self._cache.k[:, :, :count] = k
        self._cache.v[:, :, :count] = v
        self._cache.length = count
        self._pending = self._pending[count:]

    def read(self) -> Tensor:
        """Logits Float["V"] after the pending tokens, which enter the cache."""
        while True:
            logits = self.read_some(PREFILL_CHUNK)
            if logits is not None:
                return logits

    def read_some(self, most: int) -> Tensor | None:
        """Read at most `most` of the pending tokens; the logits Float["V"] after the last one, None while some are left."""
        with torch.no_grad(), using(self.variant):
            return self._read_some(most)

    def _read_some(self, most: int) -> Tensor | None:
        following = self._prompt[self._cache.length + 1 :]  # empty once the prompt is read
        scoring = self._prompt_logprobs is not None and bool(following)
        chunk, rest = self._pending.tensor_split([min(most, SCORE_CHUNK) if scoring else most])
        if scoring:
            rows = self.model.cached_logits(chunk, self._cache, all_positions=True)
            self.prompt_steps += [
                token_step(token, row, self._prompt_logprobs) for token, row in zip(following, rows, strict=False)
            ]
            logits = rows[-1]
        else:
            logits = self.model.cached_logits(chunk, self._cache)
        if len(rest) == 0:
            return logits
        self._pending = rest
        return None


def token_step(token_id: int, logits: Tensor, alternatives: int | None) -> TokenStep:
    """A token with its log-probability under logits Float["V"] and the likeliest ids; alternatives=None: neither."""
    if alternatives is None:
        return TokenStep(token_id, 0.0)
    chances = logits.float().log_softmax(-1)
    best = chances.topk(alternatives) if alternatives else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenStep(token_id, float(chances[token_id]), top)
