"""Whole replies: to one conversation, or to many prompts with a batch that stays full.

    reply = reply_to(model, tokenizer, [{"role": "user", "content": "Hi!"}], on_text=print)
    for index, reply in replies_to_many(model, tokenizer, prompts, batch=16): ...      # in the order in which they end

Each prompt has its own random generator: its reply does not depend on what else runs, up to the rounding of a wider product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.tokenizer.tokenizer import ChatTokenizer
from ..model.language_model import LanguageModel
from .batched import next_steps
from .generation import FinishReason, Generation
from .grammar import Grammar
from .prompt import Prompt, fit_messages
from .sampling import Sampling
from .text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished reply. tokens: generated ids, without the stop id."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    tokens: int


@dataclass(slots=True)
class _Running:
    index: int
    steps: Generation
    text: TextStream


def replies_to_many(
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    *,
    batch: int = 16,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Iterator[tuple[int, Reply]]:
    """(index of the prompt, its reply) as they end; at most `batch` run at once, and a new prompt replaces a finished one.

    on_text: gets each piece of text when it is certain, of whichever reply.
    """
    waiting = iter(enumerate(prompts))
    running: list[_Running] = []
    while True:
        while len(running) < batch and (found := next(waiting, None)) is not None:
            index, prompt = found
            steps = Generation(
                model,
                prompt.ids,
                max_new_tokens=prompt.max_new_tokens,
                sampling=prompt.sampling,
                stop_ids=tokenizer.stop_ids,
                seed=prompt.seed,
                grammar=None if prompt.grammar is None else prompt.grammar.copy(),
            )
            least, skip = prompt.sampling.min_tokens, not prompt.keep_special
            running.append(_Running(index, steps, TextStream(tokenizer, prompt.stops, min_tokens=least, skip_special=skip)))
        if not running:
            return
        unfinished = []
        for one, step in zip(running, next_steps(model, [r.steps for r in running]), strict=True):
            pieces = [one.text.push(step.id)] if step is not None else []
            if one.text.stopped:
                one.steps.stop()
            reason = one.steps.finish_reason if one.steps.is_over else None
            if reason is not None:
                pieces.append(one.text.finish())
            for piece in filter(None, pieces):
                on_text(piece)
            if reason is None:
                unfinished.append(one)
            else:
                yield one.index, Reply(one.text.text, reason, len(prompts[one.index].ids), len(one.steps.ids))
        running = unfinished


def reply_to(
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_strings: Sequence[str] = (),
    seed: int | None = None,
    grammar: Grammar | None = None,
    on_text: Callable[[str], None] = lambda piece: None,
    variables: Mapping[str, Any] | None = None,
    keep_special: bool = False,
) -> Reply:
    """Answer a conversation (mappings with role and content); on_text gets each piece of text when it is certain.

    variables: of the chat template, `tools` for example. keep_special: special tokens stay in the text.
    """
    ids, _ = fit_messages(tokenizer, messages, model.config.context, max_new_tokens, variables)
    prompt = Prompt(ids, max_new_tokens, sampling or Sampling(), seed, stop_strings, grammar, keep_special)
    ((_, reply),) = replies_to_many(model, tokenizer, [prompt], on_text=on_text)
    return reply
