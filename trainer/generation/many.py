"""Replies to many prompts: as one ends, the next prompt takes its place, so the batch stays full.

    for index, reply in replies_to_many(model, tokenizer, prompts, batch=16): ...      # in the order in which they end

Each prompt has its own random generator: a reply is the same whatever else runs, up to the rounding of a wider product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..model.decoder import Decoder
from .batched import next_steps
from .generation import Generation, PromptTokenizer, Reply, TextStream
from .sampling import Sampling


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue, and how. stops: strings that end the reply and are not part of it."""

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None = None
    stops: Sequence[str] = ()


@dataclass(slots=True)
class _Running:
    index: int
    prompt: Prompt
    steps: Generation
    text: TextStream


def replies_to_many(
    model: Decoder, tokenizer: PromptTokenizer, prompts: Sequence[Prompt], *, batch: int = 16
) -> Iterator[tuple[int, Reply]]:
    """(index of the prompt, its reply) as they end; at most `batch` run at once."""
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
            )
            running.append(_Running(index, prompt, steps, TextStream(tokenizer.decode, prompt.stops)))
        if not running:
            return
        going = []
        for one, step in zip(running, next_steps(model, [r.steps for r in running]), strict=True):
            if step is not None:
                one.text.push(step.id)
                if one.text.stopped:
                    one.steps.stop()
            if not one.steps.is_over:
                going.append(one)
                continue
            one.text.finish()
            reason = one.steps.finish_reason
            assert reason is not None
            yield one.index, Reply(one.text.text, reason, len(one.prompt.ids), len(one.steps.ids))
        running = going
