"""The training run, top to bottom.

    chatmill train tiny
    accelerate launch trainer/train.py tiny
    torchrun --nproc-per-node 2 -m chatmill.trainer.train tiny parallel.strategy=ddp

The same command continues a run that was stopped or killed from its newest intact checkpoint, with the same numbers.
SIGTERM and SIGUSR1 end it at the next step boundary with a checkpoint and a PREEMPTED mark (exit code 0: the launcher
requeues).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from chatmill.run_files import list_checkpoints

from ...data.packing.sources import begun_with, exclusions, open_mixture
from ...data.shards.dataset import TokenDataset
from ...data.stream import PackedBatch, PackedStream
from ..adapters.prepare import prepare
from ..adapters.sources import AdaptedSource, NewAdapter
from ..backends.choose import build_model
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.sharding import TensorSource
from ..checkpoint.vocabulary import with_new_rows
from ..config import Recipe
from ..distributed.world import end_world, start_world
from ..engine.choose import build_engine
from ..engine.engine import Engine
from ..evaluation.loss import validation_sets
from ..model.language_model import LanguageModel
from ..optim.schedule import learning_rate
from ..plan.parts import parts_of
from ..run.finished import in_words
from ..run.folder import RunFolder
from ..run.guard import BadStep, Guard
from ..run.meter import StepMeter
from ..run.profiling import StepProfiler
from ..run.progress import StepDisplay
from ..run.state import TrainState
from ..run.stopping import StopSignal, mark_preempted
from ..run.trackers import Trackers
from ..run.watchdog import Watchdog
from .budget import in_steps, remarks
from .checkpoints import RunCheckpoints, newest_readable, origin
from .context import RunContext
from .dpo import check_objective, pair_objective
from .starting import (
    announce,
    check_adapter,
    check_same_data,
    check_validation,
    check_weights,
    choose_shape,
    claim,
    run_tokenizer,
)
from .stream import merged, overlong_figures, take, training_stream
from .validation import Validation


def train(recipe: Recipe) -> int:
    """Run (or continue) the recipe; returns the number of steps done. Raises ConfigError before anything is written."""
    stop = StopSignal()  # from here on a signal ends the run cleanly, whatever it is doing
    dataset = TokenDataset.open(recipe.data.path, "train", damaged_blocks=recipe.data.damaged_blocks)
    mixture = open_mixture(recipe.data, begun=begun_with(recipe.run_dir))
    splits = validation_sets(recipe, begun_with(recipe.run_dir, "validation"))
    # a run that continues has the shape, tokenizer and weights in its own checkpoints: its base may be gone by then
    begun = newest_readable(recipe.run_dir) if recipe.model.checkpoint else None
    needs_base = recipe.model.checkpoint and (begun is None or recipe.adapter is not None)  # an adapter is nothing alone
    base = open_checkpoint(str(recipe.model.checkpoint)) if needs_base else None
    tokenizer = run_tokenizer(dataset, begun or base)
    config = choose_shape(recipe, begun or base, dataset)
    if base is not None:
        check_adapter(recipe, base, begun, config, tokenizer)
    check_validation(splits, dataset)
    exclude = exclusions(recipe.data, recipe.run_dir)
    world = start_world(recipe)
    trackers = Trackers(recipe, recipe.run_dir, world.is_main)
    folder = RunFolder(recipe.run_dir, trackers.log)
    try:
        asked, recipe = recipe, in_steps(recipe, mixture, exclude, world.batches, folder.path)
        folder.check_same(recipe)
        if world.any(world.is_main and folder.path.is_dir()):  # before its checkpoints are looked at
            claim(folder, world)
        display = StepDisplay(recipe.train.steps, quiet=not world.is_main)
        for remark in remarks(asked, recipe):
            display.say(remark)
        watchdog = Watchdog(world, recipe.train.hang_timeout_s, folder)
        run = RunContext(recipe, config, base, tokenizer, mixture, splits, exclude, world, folder, display, watchdog, stop)
        with watchdog, RunCheckpoints(run) as checkpoints:
            return _train(run, checkpoints)
    finally:
        trackers.close()
        end_world()
        folder.release()


def _train(run: RunContext, checkpoints: RunCheckpoints) -> int:
    """Build or restore everything, then take the steps."""
    recipe, world = run.recipe, run.world
    torch.manual_seed(recipe.train.seed + world.context_rank)  # neighbouring tokens do not share their dropout
    resume = checkpoints.newest()
    start = resume or run.starting_checkpoint()
    if start is not None:
        check_weights(start if run.recipe.adapter is None else run.base or start, world)
    engine = build_engine(recipe, _model(run, start), world)
    check_same_data(run.mixture, world)
    stream = training_stream(run, run.exclude)
    state = TrainState()
    if resume is not None:
        state = checkpoints.restore(resume, engine, stream)
    elif start is not None:
        engine.load_model(starting_weights(run, engine, start))
    if start is not None:
        state.lineage.append(origin(start, recipe, world))
    proof = engine.describe()
    if _is_over(run, state):
        return state.step
    claim(run.folder, world)
    with run.display.starting_at(state.step):
        announce(run, state, proof, resume)
        check_objective(recipe, stream)
        if recipe.objective == "dpo":
            engine.objective = pair_objective(run, engine, state, resume)
        training = Training(run, checkpoints, engine, stream, state)
        validation = Validation(run, engine)
        if state.step == 0 and recipe.evaluation.at_start:
            validation.run(state)
        if state.step == 0 and world.any(run.stop.asked):
            return training.preempted()
        return _steps(training, validation, evaluated=state.step if resume is None else -1)


def _model(run: RunContext, start: Checkpoint | None) -> LanguageModel:
    """The bare model, with random weights unless a checkpoint will fill it."""
    train = run.recipe.train
    model = build_model(run.config, run.recipe.kernels)
    model.set_recompute(train.activation_checkpointing, train.activation_checkpointing_layers)
    prepare(model, run.recipe)
    if start is None:
        model.init_weights(train.seed)
    return model


def starting_weights(run: RunContext, engine: Engine, start: Checkpoint) -> TensorSource:
    """What the first step trains: the checkpoint, with rows for new tokens, or with a new adapter."""
    adapter = run.recipe.adapter
    if adapter is None:
        return with_new_rows(start, run.config, run.tokenizer)
    return AdaptedSource(start, NewAdapter(start, engine.decoder, adapter, run.recipe.train.seed), adapter.scale)


def _is_over(run: RunContext, state: TrainState) -> bool:
    """Whether the run ended at this step in an earlier attempt, its last validation and checkpoint included."""
    steps = run.recipe.train.steps
    ended = state.step >= steps or is_stale(state, run.recipe)
    if not run.world.any(run.world.is_main and ended and run.folder.has_finished(state.step)):
        return False
    run.display.say(in_words(run.folder.path, state.step, steps))
    return True


@dataclass
class Training:
    """What the steps work on. stream and state are replaced when the guard rolls the run back."""

    run: RunContext
    checkpoints: RunCheckpoints
    engine: Engine
    stream: PackedStream
    state: TrainState

    def __post_init__(self) -> None:
        self._exclude = self.run.exclude

    def rolled_back(self, guard: Guard, bad: BadStep, micro: list[PackedBatch]) -> bool:
        """Go back to the newest checkpoint and leave out this step's dialogues from there on; False where there is none."""
        target = self.checkpoints.newest()
        if target is None:
            self.run.display.say(f"step {self.state.step}: there is no checkpoint to go back to; the update is only skipped.")
            if self.run.world.is_main:
                self.run.folder.event("no_rollback", step=self.state.step, kind=bad.kind, reason="no checkpoint yet")
            return False
        step = int(target.meta["step"])
        self._exclude = merged(self._exclude, step, guard.exclude(bad, self.state, micro, step))
        self.stream = training_stream(self.run, self._exclude)
        self.state = self.checkpoints.restore(target, self.engine, self.stream)
        if self.run.world.is_main:
            self.run.folder.forget_after(self.state.step)
        return True

    def preempted(self) -> int:
        """Leave the mark that the run was stopped by a signal."""
        if self.run.world.is_main:
            mark_preempted(self.run.folder, self.state.step, self.run.stop.name)
        self.run.display.say(f"stopped by a signal after step {self.state.step}; the same command continues.")
        return self.state.step


def _steps(training: Training, validation: Validation, evaluated: int) -> int:
    """The loop. evaluated: the step whose validation is done, or -1: a run killed in its last validation still has to do it."""
    run, engine, checkpoints = training.run, training.engine, training.checkpoints
    recipe, folder, world, display, watchdog = run.recipe, run.folder, run.world, run.display, run.watchdog
    guessing = math.log(run.config.vocab_size) if recipe.objective == "sft" else None
    guard = Guard(recipe.guard, folder, world, guessing)
    profiler = StepProfiler(recipe.logging.profile_steps, folder.path / "profile", world, training.state.step)
    meter = StepMeter(run.config, world, profiler, parts_of(recipe, run.config))
    batches = iter(training.stream)
    best = False
    while (state := training.state).step < recipe.train.steps and not is_stale(state, recipe):
        watchdog.beat("data", state.step)
        waited = time.monotonic()
        micro = take(batches, recipe.train.accumulation)
        if not micro:  # dialogues excluded since the steps were counted leave fewer steps
            break
        meter.waited(time.monotonic() - waited)
        seen = state.tokens + micro[0].step_tokens
        lr = learning_rate(state.step, recipe.train.steps, recipe.optimizer.lr, recipe.schedule, seen, recipe.schedule_tokens)
        watchdog.beat("forward and backward", state.step)
        sums = engine.forward_backward(micro)
        engine.clip()
        watchdog.beat("update", state.step)
        loss_sum, stops = world.sum([float(sums.loss_sum), float(run.stop.asked)])
        loss = loss_sum / max(1, micro[0].step_examples)
        bad = guard.judge_loss(loss, state)
        if bad is None or bad.action == "warn":
            grad_norm = engine.step(lr)
            bad = guard.judge_gradient(grad_norm) or bad
        else:
            engine.discard()
            grad_norm = math.nan
        state.step += 1
        state.tokens += micro[0].step_tokens
        state.loss_tokens += micro[0].step_loss_tokens
        roll_back = guard.decide(bad, loss, state, micro, display.say)
        if bad is not None and roll_back and training.rolled_back(guard, bad, micro):
            batches = iter(training.stream)
            meter.restart()
            continue
        meter.stepped(micro)
        if state.step % recipe.logging.every_steps == 0 or state.step == recipe.train.steps:
            line = meter.line(step=state.step, loss=loss, lr=lr, grad_norm=grad_norm, total_tokens=state.tokens)
            line |= engine.decoder.interval_figures(world.sum)
            if recipe.objective == "dpo":
                line["accuracy"] = world.sum([float(sums.correct)])[0] / max(1, micro[0].step_examples)
            if world.is_main:
                folder.metric(**line | overlong_figures(training.stream))
            display.show(state.step, loss, lr, grad_norm, line["tokens_per_s"])
        best = False
        if recipe.evaluation.every_steps and state.step % recipe.evaluation.every_steps == 0:
            best = validation.run(state)
            evaluated = state.step
            meter.restart()
        watchdog.beat("checkpoint", state.step)
        if best or state.step % recipe.checkpoint.every_steps == 0:
            checkpoints.save(engine, training.stream, state, best)
            meter.restart()
        if stops:
            checkpoints.save_last(engine, training.stream, state, best)
            return training.preempted()
    if recipe.evaluation.at_end and evaluated != state.step:
        best = validation.run(state)
    checkpoints.save_last(engine, training.stream, state, best)
    if world.is_main:
        early = {"early_stop": True} if is_stale(state, recipe) else {}
        folder.event("finished", step=state.step, tokens=state.tokens, loss_tokens=state.loss_tokens, **early)
        kept = list_checkpoints(folder.path)[-1]
        display.say(f"finished: {state.step} steps, {state.tokens:,} tokens, checkpoint {kept}")
    return state.step


def is_stale(state: TrainState, recipe: Recipe) -> bool:
    """Whether the run ends early: too many validations in a row without a better one (evaluation.patience)."""
    return recipe.evaluation.patience is not None and state.stale_validations >= recipe.evaluation.patience
