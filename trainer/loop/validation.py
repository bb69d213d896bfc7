"""Validation during a training run: measure, log, answer the prompts, and tell whether it is the best so far.

validation = Validation(run, engine)
is_best = validation.run(state)                     # on all ranks; a signal cuts it short

Each dialogue is counted once over all ranks, so the figures do not depend on the world size (evaluation/loss.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from ...data.samples.repeats import in_words as repeats_in_words
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..engine.engine import Engine
from ..evaluation.loss import evaluate, in_words, pooled, validation_batches
from ..generation.replies import reply_to
from ..generation.sampling import Sampling
from ..model.tile_maps import tile_map_maker
from ..run.state import TrainState
from .context import RunContext

SAMPLING = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.15)  # small models repeat themselves when greedy


class Validation:
    """Runs the validations of one training run."""

    def __init__(self, context: RunContext, engine: Engine) -> None:
        self.context, self.engine = context, engine
        self.recipe, self.world, self.display = context.recipe, context.world, context.display
        attention, precision = self.recipe.kernels.attention, self.recipe.train.precision
        found = {str(split.path): repeats_in_words(split.manifest.get("repeats")) for split in context.splits.values()}
        self._repeats = {path: told for path, told in found.items() if told}
        self._told = False
        self._annotate = tile_map_maker(context.config, attention, precision, self.world.device)

    def run(self, state: TrainState) -> bool:
        """Measure, log and answer the prompts; True when it is the best validation so far and checkpoints follow it."""
        began = time.monotonic()
        results = self._measure(state.step)
        if results is None:
            self.display.say(f"validation at step {state.step} was cut short by a signal")
            return False
        result = pooled(list(results.values()))
        if self.world.is_main:
            each: dict[str, object] = {"eval_by_data": results} if len(results) > 1 else {}
            each |= {"repeats_training": sorted(self._repeats)} if self._repeats else {}
            self.context.folder.metric(step=state.step, eval=result, **each, seconds=round(time.monotonic() - began, 3))
        repeated = " (repeats training texts)" if self._repeats else ""
        self.display.say(f"validation at step {state.step}{repeated}: {in_words(result)}")
        for path, told in self._repeats.items() if not self._told else ():
            self.display.say(f"  note: the validation split of {path} {told}")
        self._told = True
        if self.recipe.evaluation.ema:
            self._measure_average(state.step)
        self._answer_prompts(state.step)
        metric = self.recipe.checkpoint.best
        return state.step > 0 and state.validated(result, metric or "loss") and metric is not None

    def _measure(self, step: int) -> dict[str, dict[str, float]] | None:
        """Figures of each validation set with the current weights, or None where a signal cut it short."""

        def asked() -> bool:
            self.context.watchdog.beat("validation", step)
            return self.context.stop.asked

        evaluation = self.recipe.evaluation
        self.engine.model.eval()
        results: dict[str, dict[str, float]] = {}
        for name, split in self.context.splits.items():
            batches = validation_batches(
                split,
                sequence_length=self.recipe.data.sequence_length,
                micro_batch=evaluation.micro_batch or self.recipe.train.micro_batch,
                world=self.world,
                max_dialogues=evaluation.max_dialogues,
                annotate=self._annotate,
            )
            figures = evaluate(self.engine.forward, batches, self.world, asked, self.recipe.objective == "dpo")
            if figures is None:
                return None
            results[name] = figures
        return results

    def _measure_average(self, step: int) -> None:
        with self.engine.averaged_weights():
            results = self._measure(step)
        if results is None:
            return
        result = pooled(list(results.values()))
        if self.world.is_main:
            self.context.folder.metric(step=step, eval_ema=result)
        self.display.say(f"averaged weights at step {step}: {in_words(result)}")

    def _answer_prompts(self, step: int) -> None:
        evaluation = self.recipe.evaluation
        prompts, longest = evaluation.prompts, evaluation.max_new_tokens
        for prompt, reply in answers(self.engine, self.context.tokenizer, prompts, longest):
            if self.world.is_main:
                self.context.folder.sample(step=step, prompt=prompt, reply=reply)
            self.display.say(f"  > {prompt}\n  < {reply}")


def answers(engine: Engine, tokenizer: ChatTokenizer, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[str, str]]:
    """(prompt, reply) of single questions, sampled with a fixed seed: on rank 0, or on all ranks where weights are gathered."""
    if not (engine.world.is_main or engine.gathers):
        return
    engine.decoder.eval()
    for prompt in prompts:
        # not compiled: every length of a prompt and of its cache would be another shape
        with engine.autocast(), torch.compiler.set_stance("force_eager"):
            reply = reply_to(
                engine.decoder,
                tokenizer,
                [{"role": "user", "content": prompt}],
                max_new_tokens=max_new_tokens,
                sampling=SAMPLING,
                seed=engine.recipe.train.seed,
            )
        yield prompt, reply.text
