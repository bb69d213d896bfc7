"""Validation inside a training run: measure, log, answer the prompts, and say whether it is the best so far.

validation = Validation(recipe, validation_sets(recipe), engine, checkpoints, display, watchdog, stop)
is_best = validation.run(state)                     # on all ranks; a signal cuts it short

Sums are taken over all ranks, each dialogue once, so that the world size changes no figure (evaluation.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from ...data.shards.dataset import TokenDataset
from ..config import Recipe
from ..engine.engine import Engine
from ..evaluation.loss import evaluate, in_words, pooled, validation_batches
from ..model.attention_plans import plan_maker
from ..run.progress import StepDisplay
from ..run.state import TrainState
from ..run.stopping import StopSignal
from ..run.watchdog import Watchdog
from .checkpoints import RunCheckpoints


class Validation:
    """Runs the validations of one training run. splits: validation split per data set."""

    def __init__(
        self,
        recipe: Recipe,
        splits: Mapping[str, TokenDataset],
        engine: Engine,
        checkpoints: RunCheckpoints,
        display: StepDisplay,
        watchdog: Watchdog,
        stop: StopSignal,
    ) -> None:
        self.recipe, self.splits, self.engine, self.display = recipe, splits, engine, display
        self.folder, self.world, self.tokenizer = checkpoints.folder, checkpoints.world, checkpoints.tokenizer
        self.watchdog, self.stop = watchdog, stop
        train, kernel = recipe.train, recipe.kernels.attention
        self.annotate = plan_maker(engine.decoder.config, kernel, train.precision, self.world.device)

    def run(self, state: TrainState) -> bool:
        """Measure, log and answer the prompts; True when it is the best validation so far and checkpoints follow it."""
        began = time.monotonic()
        results = self._measure(state.step)
        if results is None:
            self.display.say(f"validation at step {state.step} was cut short by a signal")
            return False
        result = pooled(list(results.values()))
        if self.world.is_main:
            each = {"eval_by_data": results} if len(results) > 1 else {}
            self.folder.metric(step=state.step, eval=result, **each, seconds=round(time.monotonic() - began, 3))
        self.display.say(f"validation at step {state.step}: {in_words(result)}")
        if self.recipe.evaluation.ema:
            self._measure_average(state.step)
        self._answer_prompts(state.step)
        metric = self.recipe.checkpoint.best
        return state.step > 0 and state.validated(result, metric or "loss") and metric is not None

    def _measure(self, step: int) -> dict[str, dict[str, float]] | None:
        """Figures of each validation set with the weights as they are, or None where a signal cut it short."""

        def asked() -> bool:
            self.watchdog.beat("validation", step)
            return self.stop.asked

        evaluation = self.recipe.evaluation
        self.engine.model.eval()
        results: dict[str, dict[str, float]] = {}
        for name, split in self.splits.items():
            batches = validation_batches(
                split,
                sequence_length=self.recipe.data.sequence_length,
                micro_batch=evaluation.micro_batch or self.recipe.train.micro_batch,
                world=self.world,
                max_dialogues=evaluation.max_dialogues,
                annotate=self.annotate,
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
            self.folder.metric(step=step, eval_ema=result)
        self.display.say(f"averaged weights at step {step}: {in_words(result)}")

    def _answer_prompts(self, step: int) -> None:
        evaluation = self.recipe.evaluation
        for prompt, reply in self.engine.replies(self.tokenizer, evaluation.prompts, evaluation.max_new_tokens):
            if self.world.is_main:
                self.folder.sample(step=step, prompt=prompt, reply=reply)
            self.display.say(f"  > {prompt}\n  < {reply}")
