"""Replies token by token: prefill, decode with a KV cache, stop, and turn ids into text that can be streamed.

    for token_id in generate(model, prompt_ids, max_new_tokens=64, stop_ids=tokenizer.stop_ids):
        print(text.push(token_id), end="")

`generate` yields ids and never the stop id itself. `TextStream` turns them into text piece by piece: it releases
neither half a character nor the beginning of a stop string, and its pieces joined are the whole reply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from chatmill.config import ConfigError

from ..model.decoder import Decoder, KVCache
from .sampling import Sampling, make_generator, next_token

FinishReason = Literal["stop", "length"]
SCORE_CHUNK = 256  # tokens of a prompt whose logits exist at a time, where their log-probabilities are wanted
PREFILL_CHUNK = 1024  # tokens per forward pass of a prompt: bounds the memory of attention and MLP
WINDOW = 32  # tokens decoded again per step at most, so that a long reply costs linear time


class PromptTokenizer(Protocol):
    """What generation asks of a tokenizer; `chatmill.data.tokenizer.tokenizer.ChatTokenizer` is one."""

    @property
    def stop_ids(self) -> frozenset[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]: ...


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

    "stop": a stop id came (stop_step is that token), or the consumer called `stop()`; "length": max_new_tokens or the
    context is full. prompt_logprobs: alternatives per token of the prompt; prompt_steps then has one TokenStep for each
    token but the first, which follows nothing.
    Closing it, or dropping it, ends the work: nothing runs between two `next` calls.
    """

    def __init__(
        self,
        model: Decoder,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = frozenset(),
        seed: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> None:
        check_prompt(prompt_ids, model.config.context, model.config.vocab_size)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
        self.model = model
        self.sampling = sampling or Sampling()
        self.stop_ids = frozenset(stop_ids)
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
        self._cache = KVCache(model.config, len(prompt_ids) + self._room, dtype, weight.device)
        self._pending = torch.tensor(list(prompt_ids), dtype=torch.long, device=weight.device)
        self._seen_ids = set(prompt_ids)  # on the host: torch.unique would make it wait for the GPU
        self._seen = torch.tensor(sorted(self._seen_ids), dtype=torch.long, device=weight.device)
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
        """No further token is wanted; finish_reason tells why."""
        if self.finish_reason is None and len(self.ids) >= self._room:
            self.finish_reason = "length"
        return self.finish_reason is not None

    @property
    def pending(self) -> Tensor:
        """Int64["n"]: tokens that the model has not read yet; the prompt at first, then one at a time."""
        return self._pending

    @property
    def cache(self) -> KVCache:
        """Keys and values of the tokens read so far."""
        return self._cache

    def accept(self, logits: Tensor) -> TokenStep | None:
        """Choose from the logits Float["V"] after the pending tokens, which are in the cache; None at a stop id."""
        chosen = next_token(logits, self.sampling, self._seen, self._generator)
        if chosen in self.stop_ids:
            self.finish_reason = "stop"
            self.stop_step = token_step(chosen, logits, self._logprobs)
            return None
        self.ids.append(chosen)
        self._pending = torch.tensor([chosen], dtype=torch.long, device=self._device)
        if self.sampling.repetition_penalty != 1.0 and chosen not in self._seen_ids:
            self._seen_ids.add(chosen)
            self._seen = torch.cat((self._seen, self._pending))
        return token_step(chosen, logits, self._logprobs)

    def stop(self) -> None:
        """End the reply from outside (a stop string was met)."""
        self.finish_reason = "stop"

    @property
    def read_ids(self) -> list[int]:
        """The tokens that the cache holds, in their order."""
        return (self._prompt + self.ids)[: self._cache.length]

    def start_from(self, k: Tensor, v: Tensor) -> None:
        """Take the first tokens of the prompt as read: their keys and values ["layers Hk n D"], n less than the prompt.

        Called before anything is read. A prompt whose tokens are to be scored is read whole all the same.
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

    @torch.no_grad()
    def read_some(self, most: int) -> Tensor | None:
        """Read at most so many of the pending tokens; their logits Float["V"] if these were the last, else None."""
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
    """A token with its log-probability under logits Float["V"], and the likeliest ids; without both for None."""
    if alternatives is None:
        return TokenStep(token_id, 0.0)
    chances = logits.float().log_softmax(-1)
    best = chances.topk(alternatives) if alternatives else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenStep(token_id, float(chances[token_id]), top)


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = frozenset(),
    stop_strings: Sequence[str] = (),
    seed: int | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Iterator[int]:
    """Ids of one reply, as they are made; the stop id is not among them.

    stop_strings needs `decode` (ids -> text). The token that completes a stop string is the last one yielded:
    cut the text with `TextStream`, which never shows any of it.
    """
    if stop_strings and decode is None:
        raise ConfigError("stop_strings needs decode=tokenizer.decode: the text is searched, not the ids.")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    steps = Generation(model, prompt_ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids, seed=seed)
    text = TextStream(decode, stop_strings) if decode is not None and stop_strings else None

    def ids() -> Iterator[int]:
        for step in steps:
            yield step.id
            if text is not None:
                text.push(step.id)
                if text.stopped:
                    return

    return ids()


class TextStream:
    """Ids in, text out, safe to show at once.

    push(id) returns the text that is certain by now; finish() the rest. Held back: a last character whose UTF-8
    bytes are incomplete, and any tail that could still grow into a stop string. `stopped` turns True when one
    is met: nothing of it, and nothing after it, is ever released.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()) -> None:
        if any(not s for s in stop_strings):
            raise ConfigError("stop_strings: an empty string would stop every reply at once; remove it.")
        self._decode = decode
        self._stops = tuple(stop_strings)
        self._ids: list[int] = []
        self._done = 0  # characters of decode(self._ids) that were taken over
        self._held = ""  # decoded, but perhaps the start of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; often empty."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # An unfinished UTF-8 sequence decodes to exactly one replacement character, at the very end.
        end = len(text) - text.endswith("\ufffd")
        piece, self._done = text[self._done : end], max(self._done, end)
        if len(self._ids) > WINDOW and end == len(text):
            # Some tokens stay as left context: the first token of a text may be decoded without its leading space.
            self._ids = self._ids[-WINDOW // 4 :]
            self._done = len(self._decode(self._ids))
        return self._release(piece)

    def finish(self) -> str:
        """Whatever was still held back: after this the text is complete."""
        if self.stopped:
            return ""
        rest = self._decode(self._ids)[self._done :] if self._ids else ""
        self._ids, self._done = [], 0
        piece = self._release(rest)
        if not self.stopped:
            self.text += self._held
            piece, self._held = piece + self._held, ""
        return piece

    def _release(self, piece: str) -> str:
        pending = self._held + piece
        found = [at for at in (pending.find(s) for s in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            out = pending[: min(found)]
        else:
            keep = _possible_start(pending, self._stops)
            out, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += out
        return out


def _possible_start(text: str, stops: Sequence[str]) -> int:
    """Length of the longest tail of text that is a proper beginning of a stop string."""
    longest = max((len(s) - 1 for s in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return size
    return 0


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished reply. tokens counts generated ids, the stop id not among them."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    tokens: int


def check_prompt(prompt_ids: Sequence[int], context: int, vocab_size: int) -> None:
    """Raise ConfigError for a prompt that the model cannot take."""
    if not prompt_ids:
        raise ConfigError("the prompt is empty: expected at least one token.")
    if len(prompt_ids) >= context:
        raise ConfigError(
            f"the prompt has {len(prompt_ids)} tokens; the model's context is {context}, the reply included.\n"
            "Shorten the conversation."
        )
    wrong = [i for i in prompt_ids if not 0 <= i < vocab_size]
    if wrong:
        raise ConfigError(
            f"the prompt holds token id {wrong[0]}; the model knows 0..{vocab_size - 1}. Is this the model's own tokenizer?"
        )


def fit_messages(
    tokenizer: PromptTokenizer, messages: Sequence[Mapping[str, Any]], context: int, reserve: int
) -> tuple[list[int], int]:
    """Prompt ids of the newest part of a conversation that leaves `reserve` tokens for the reply.

    The oldest turns go first, a question together with its answer; a leading system message and the last turn stay.
    Returns (ids, number of turns left out). Raises ConfigError if the last turn alone does not fit.
    """
    turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    rest = turns[len(system) :]
    budget = context - min(reserve, context // 2)
    dropped = 0
    while True:
        ids = tokenizer.prompt_ids(system + rest)
        if len(ids) <= budget:
            return ids, dropped
        cut = next((i for i in range(1, len(rest)) if rest[i]["role"] == "user"), None)
        if cut is None:
            break
        rest, dropped = rest[cut:], dropped + cut
    if len(ids) < context:
        return ids, dropped
    raise ConfigError(
        f"the last message makes a prompt of {len(ids)} tokens; the model's context is {context}, the reply included.\n"
        "Shorten the message."
    )


def reply_to(
    model: Decoder,
    tokenizer: PromptTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_strings: Sequence[str] = (),
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Reply:
    """Answer a conversation (dicts with role and content); on_text gets the pieces as they become certain."""
    ids, _ = fit_messages(tokenizer, messages, model.config.context, max_new_tokens)
    steps = Generation(model, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=tokenizer.stop_ids, seed=seed)
    text = TextStream(tokenizer.decode, stop_strings)
    for step in steps:
        piece = text.push(step.id)
        if piece and on_text:
            on_text(piece)
        if text.stopped:
            steps.stop()
    piece = text.finish()
    if piece and on_text:
        on_text(piece)
    assert steps.finish_reason is not None
    return Reply(text.text, steps.finish_reason, len(ids), len(steps.ids))
