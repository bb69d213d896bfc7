"""The training run, top to bottom.

    chatmill train tiny
    accelerate launch trainer/train.py tiny
    torchrun --nproc-per-node 2 -m chatmill.trainer.train tiny parallel.strategy=ddp

The same command continues a run that was stopped or killed, from its newest whole checkpoint, with the same numbers.
SIGTERM and SIGUSR1 end it at the next step boundary with a checkpoint and a PREEMPTED mark (exit code 0: a launcher requeues).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from chatmill.config import ConfigError
from chatmill.run_files import list_checkpoints

from ...data.check.verify import quarantine_lines
from ...data.packing.mixture import Mixture
from ...data.packing.sources import exclusions, open_mixture
from ...data.shards.dataset import TokenDataset
from ...data.stream import PackedBatch, PackedStream
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..config import Recipe
from ..distributed.world import World, end_world, start_world
from ..engine.engine import Engine
from ..evaluation.loss import validation_sets
from ..model.decoder import Decoder
from ..model_config import ModelConfig
from ..optim.schedule import learning_rate
from ..run.folder import RunFolder, describe_environment
from ..run.guard import Finding, Guard
from ..run.meter import StepMeter
from ..run.profiling import StepProfiler
from ..run.progress import StepDisplay
from ..run.state import TrainState
from ..run.stopping import StopSignal, mark_preempted
from ..run.trackers import Trackers
from ..run.watchdog import Watchdog
from .budget import in_steps
from .checkpoints import RunCheckpoints, origin
from .dpo import check_objective, pair_objective, reference_pass
from .starting import check_same_data, choose_shape, say_proof
from .stream import merged, overlong_figures, take, training_stream
from .validation import Validation


def train(recipe: Recipe) -> int:
    """Run (or continue) the recipe; returns the number of steps done. Raises ConfigError before anything is written."""
    stop = StopSignal()  # from here on a signal ends the run in order, whatever it is doing
    dataset = TokenDataset.open(recipe.data.path, "train", damaged_blocks=recipe.data.damaged_blocks)
    mixture = open_mixture(recipe.data)
    validation = validation_sets(recipe)
    tokenizer = ChatTokenizer.load(dataset.path / "tokenizer")
    base = open_checkpoint(recipe.model.checkpoint) if recipe.model.checkpoint else None
    config = choose_shape(recipe, base, dataset)
    folder = RunFolder(recipe.run_dir)
    exclude = exclusions(recipe.data, folder.path)
    world = start_world(recipe)
    trackers = Trackers(recipe, folder.path, world.is_main)
    folder.on_metric = trackers.log
    try:
        recipe = in_steps(recipe, mixture, exclude, world.world_size, folder.path)
        folder.check_same(recipe)
        if world.any(world.is_main and folder.path.is_dir()):  # before its checkpoints are looked at
            _claim(folder, world)
        with (
            Watchdog(world, recipe.train.hang_timeout_s, folder) as watchdog,
            RunCheckpoints(folder, recipe, config, tokenizer, world) as checkpoints,
        ):
            return _train(recipe, config, base, mixture, exclude, validation, checkpoints, watchdog, stop)
    finally:
        trackers.close()
        end_world()
        folder.release()


def _claim(folder: RunFolder, world: World) -> None:
    if world.any(world.is_main and not folder.claim()):
        raise ConfigError(
            f"{folder.path}: another training is running in it; two would mix their checkpoints.\n"
            f"Wait for it, stop it with `chatmill cancel {folder.path}`, or begin another run: run.name=NEW."
        )


def _train(
    recipe: Recipe,
    config: ModelConfig,
    base: Checkpoint | None,
    mixture: Mixture,
    exclude: Mapping[int, frozenset[str]],
    splits: Mapping[str, TokenDataset],
    checkpoints: RunCheckpoints,
    watchdog: Watchdog,
    stop: StopSignal,
) -> int:
    """Build or restore everything, then run the steps."""
    folder, world = checkpoints.folder, checkpoints.world
    torch.manual_seed(recipe.train.seed)
    resume = checkpoints.newest()
    model = Decoder(config, recipe.kernels)
    model.set_recompute(recipe.train.activation_checkpointing, recipe.train.activation_checkpointing_layers)
    if resume is None and base is None:
        model.init_weights(recipe.train.seed)
    engine = build_engine(recipe, model, world)
    check_same_data(mixture, world)
    stream = training_stream(recipe, config, mixture, exclude, world)
    state = TrainState()
    if resume is not None:
        state = checkpoints.restore(resume, engine, stream)
        state.lineage.append(origin(resume, recipe, world))
    elif base is not None:
        engine.load_model(base)
        state.lineage.append(origin(base, recipe, world))
    proof = engine.describe()
    ended = state.step >= recipe.train.steps or is_stale(state, recipe)
    if world.any(world.is_main and ended and folder.is_finished(state.step)):
        if world.is_main:
            early = "It stopped early; raise evaluation.patience to go on." if state.step < recipe.train.steps else ""
            print(f"{folder.path} is finished: {state.step} of {recipe.train.steps} steps. {early}".rstrip())
        return state.step
    _claim(folder, world)
    with StepDisplay(recipe.train.steps, state.step, quiet=not world.is_main) as display:
        checkpoints.say = display.say
        if world.is_main:
            folder.create(recipe, proof | {"parameters": config.parameter_counts(), **describe_environment()})
            folder.forget_after(state.step)
            folder.event("resume" if resume else "start", step=state.step, **proof)
            for name, data in [*mixture.sources.items(), *splits.items()]:
                for held in quarantine_lines({f"{name}/{data.split}": data.held} if isinstance(data, TokenDataset) else {}):
                    folder.event("quarantine", step=state.step, block=held)
                    display.say(held)
        say_proof(display, proof, config, recipe)
        if resume is not None:
            display.say(f"continuing {folder.path} from step {state.step} ({resume.path.name})")
        check_objective(recipe, stream)
        if recipe.objective == "dpo":
            sources: list[Mixture | TokenDataset] = [mixture, *splits.values()]
            passes = [reference_pass(recipe, source, world) for source in sources]
            with watchdog.paused():
                engine.objective = pair_objective(recipe, engine, base, resume, passes, folder.path, world, display.say)
        validation = Validation(recipe, splits, engine, checkpoints, display, watchdog, stop)
        if state.step == 0 and recipe.evaluation.at_start:
            validation.run(state)
        run = Run(recipe, config, mixture, exclude, engine, stream, state, checkpoints, display, watchdog, stop)
        if state.step == 0 and world.any(stop.asked):
            return run.preempted()
        return _steps(run, validation, evaluated=state.step if resume is None else -1)


@dataclass
class Run:
    """What the steps work on. exclude, stream and state are replaced when the guard rolls the run back."""

    recipe: Recipe
    config: ModelConfig
    mixture: Mixture
    exclude: Mapping[int, frozenset[str]]
    engine: Engine
    stream: PackedStream
    state: TrainState
    checkpoints: RunCheckpoints
    display: StepDisplay
    watchdog: Watchdog
    stop: StopSignal

    def rolled_back(self, guard: Guard, finding: Finding, micro: list[PackedBatch]) -> bool:
        """Go back to the newest checkpoint, the dialogues of this step left out from there on; False where there is none."""
        target = self.checkpoints.newest()
        if target is None:
            return False
        step = int(target.meta["step"])
        uids = guard.exclude(finding, self.state, micro, step)
        self.exclude = merged(self.exclude, step, uids)
        self.stream = training_stream(self.recipe, self.config, self.mixture, self.exclude, self.checkpoints.world)
        self.state = self.checkpoints.restore(target, self.engine, self.stream)
        if self.checkpoints.world.is_main:
            self.checkpoints.folder.forget_after(self.state.step)
        return True

    def preempted(self) -> int:
        """Leave the mark that the run was stopped by a signal."""
        if self.checkpoints.world.is_main:
            mark_preempted(self.checkpoints.folder, self.state.step, self.stop.name)
        self.display.say(f"stopped by a signal after step {self.state.step}; the same command continues.")
        return self.state.step


def _steps(run: Run, validation: Validation, evaluated: int) -> int:
    """The loop. evaluated: the step whose validation is done; -1: a run killed in its last validation still owes it."""
    recipe, engine, checkpoints, display, watchdog = run.recipe, run.engine, run.checkpoints, run.display, run.watchdog
    folder, world = checkpoints.folder, checkpoints.world
    guard = Guard(recipe.guard, folder, world)
    meter = StepMeter(run.config, world)
    meter.profiler = StepProfiler(recipe.logging.profile_steps, folder.path / "profile", world, run.state.step)
    batches = iter(run.stream)
    best = False
    while (state := run.state).step < recipe.train.steps and not is_stale(state, recipe):
        watchdog.beat("data", state.step)
        waited = time.monotonic()
        micro = take(batches, recipe.train.accumulation)
        if not micro:  # exclusions made since the steps were counted left less to learn from
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
        finding = guard.judge_loss(loss, state)
        if finding is None or finding.action == "warn":
            grad_norm = engine.step(lr)
            finding = guard.judge_gradient(grad_norm) or finding
        else:
            engine.discard()
            grad_norm = math.nan
        state.step += 1
        state.tokens += micro[0].step_tokens
        state.loss_tokens += micro[0].step_loss_tokens
        action = guard.decide(finding, loss, state, micro, display.say)
        if finding is not None and action == "rollback" and run.rolled_back(guard, finding, micro):
            batches = iter(run.stream)
            meter.restart()
            continue
        meter.stepped(micro)
        if state.step % recipe.logging.every_steps == 0 or state.step == recipe.train.steps:
            line = meter.line(step=state.step, loss=loss, lr=lr, grad_norm=grad_norm, total_tokens=state.tokens)
            if recipe.objective == "dpo":
                line["accuracy"] = world.sum([float(sums.correct)])[0] / max(1, micro[0].step_examples)
            if world.is_main:
                folder.metric(**line | overlong_figures(run.stream))
            display.show(state.step, loss, lr, grad_norm, line["tokens_per_s"])
        best = False
        if recipe.evaluation.every_steps and state.step % recipe.evaluation.every_steps == 0:
            best = validation.run(state)
            evaluated = state.step
            meter.restart()
        watchdog.beat("checkpoint", state.step)
        if best or state.step % recipe.checkpoint.every_steps == 0:
            checkpoints.save(engine, run.stream, state, best)
            meter.restart()
        if stops:
            checkpoints.save_last(engine, run.stream, state, best)
            return run.preempted()
    if recipe.evaluation.at_end and evaluated != state.step:
        best = validation.run(state)
    checkpoints.save_last(engine, run.stream, state, best)
    if world.is_main:
        early = {"early_stop": True} if is_stale(state, recipe) else {}
        folder.event("finished", step=state.step, tokens=state.tokens, loss_tokens=state.loss_tokens, **early)
        kept = list_checkpoints(folder.path)[-1]
        display.say(f"finished: {state.step} steps, {state.tokens:,} tokens, checkpoint {kept}")
    return state.step


def build_engine(recipe: Recipe, model: Decoder, world: World) -> Engine:
    """The engine that parallel.strategy names."""
    if recipe.parallel.strategy.startswith("zero"):
        from ..engine.zero import ZeroEngine

        return ZeroEngine(recipe, model, world)
    return Engine(recipe, model, world)


def is_stale(state: TrainState, recipe: Recipe) -> bool:
    """Whether so many validations in a row brought nothing better that the run ends early (evaluation.patience)."""
    return recipe.evaluation.patience is not None and state.stale_validations >= recipe.evaluation.patience
