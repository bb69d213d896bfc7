"""The training run, top to bottom.

    chatmill train tiny
    accelerate launch trainer/train.py tiny
    torchrun --nproc-per-node 2 -m chatmill.trainer.train tiny parallel.strategy=ddp

The same command continues a run that was stopped or killed, from its newest whole checkpoint, with the same numbers.
SIGTERM and SIGUSR1 end it at the next step boundary with a checkpoint and a PREEMPTED mark (exit code 0: a launcher requeues).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.data.mixture import Mixture
from chatmill.data.shards import TokenDataset
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.data.tokenizer import ChatTokenizer
from chatmill.data.training_data import exclusions, open_mixture
from chatmill.data.verification import quarantine_lines
from chatmill.kernels.attention_config import DevicePlan, plan_attention
from chatmill.run_files import PREEMPTED, list_checkpoints
from chatmill.trainer.budget import in_steps
from chatmill.trainer.checkpoint import Checkpoint, open_checkpoint
from chatmill.trainer.config import ModelConfig, Recipe
from chatmill.trainer.engine import Engine
from chatmill.trainer.evaluation import check_tokenizer, evaluate, in_words, pooled, validation_batches, validation_sets
from chatmill.trainer.guard import Guard
from chatmill.trainer.metrics import StepMeter
from chatmill.trainer.model import Decoder
from chatmill.trainer.preference import check_objective, pair_objective, reference_pass
from chatmill.trainer.profiling import StepProfiler
from chatmill.trainer.progress import StepDisplay
from chatmill.trainer.run_checkpoints import RunCheckpoints, origin
from chatmill.trainer.run_folder import RunFolder, describe_environment
from chatmill.trainer.schedule import learning_rate
from chatmill.trainer.trackers import Trackers
from chatmill.trainer.train_state import TrainState
from chatmill.trainer.watchdog import Watchdog
from chatmill.trainer.world import World, end_world, start_world


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
        with (
            Watchdog(world, recipe.train.hang_timeout_s, folder) as watchdog,
            RunCheckpoints(folder, recipe, config, tokenizer, world) as checkpoints,
        ):
            return _train(recipe, config, base, mixture, exclude, validation, checkpoints, watchdog, stop)
    finally:
        trackers.close()
        end_world()


def choose_shape(recipe: Recipe, base: Checkpoint | None, dataset: TokenDataset) -> ModelConfig:
    """The model's shape, checked against the recipe, the data and the tokenizer. Raises ConfigError."""
    config = recipe.model.shape()
    if base is not None:
        written = {name: getattr(config, name) for name in recipe.model.model_fields_set if name != "checkpoint"}
        wrong = [
            f"model.{k}={v!r} (checkpoint: {getattr(base.config, k)!r})"
            for k, v in written.items()
            if getattr(base.config, k) != v
        ]
        if wrong:
            raise ConfigError(f"{base.path} has another shape than the recipe: {', '.join(wrong)}.\nLeave those fields out.")
        config = base.config
        check_tokenizer(base, dataset)
    if dataset.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{dataset.path} holds token ids up to {dataset.vocab_size - 1}, model.vocab_size is {config.vocab_size}.\n"
            f"Set model.vocab_size to at least {dataset.vocab_size}."
        )
    if recipe.data.sequence_length > config.context:
        raise ConfigError(
            f"data.sequence_length={recipe.data.sequence_length} exceeds the model's context of {config.context}."
        )
    return config


def _train(
    recipe: Recipe,
    config: ModelConfig,
    base: Checkpoint | None,
    mixture: Mixture,
    exclude: Mapping[int, frozenset[str]],
    validation: Mapping[str, TokenDataset],
    checkpoints: RunCheckpoints,
    watchdog: Watchdog,
    stop: StopSignal,
) -> int:
    folder, world = checkpoints.folder, checkpoints.world
    torch.manual_seed(recipe.train.seed)
    resume = checkpoints.newest()
    model = Decoder(config, recipe.kernels)
    model.activation_checkpointing = recipe.train.activation_checkpointing
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
            more = "Raise train.steps" if state.step >= recipe.train.steps else "It stopped early; raise evaluation.patience"
            print(f"{folder.path} is finished: {state.step} of {recipe.train.steps} steps. {more} to go on.")
        return state.step
    with StepDisplay(recipe.train.steps, state.step, quiet=not world.is_main) as display:
        checkpoints.say = display.say
        if world.is_main:
            folder.create(recipe, proof | {"parameters": config.parameter_counts(), **describe_environment()})
            folder.forget_after(state.step)
            folder.event("resume" if resume else "start", step=state.step, **proof)
            for name, data in [*mixture.sources.items(), *validation.items()]:
                for held in quarantine_lines({f"{name}/{data.split}": data.held} if isinstance(data, TokenDataset) else {}):
                    folder.event("quarantine", step=state.step, block=held)
                    display.say(held)
        say_proof(display, proof, config, recipe)
        if resume is not None:
            display.say(f"continuing {folder.path} from step {state.step} ({resume.path.name})")

        def asked() -> bool:
            watchdog.beat("validation", state.step)
            return stop.asked

        check_objective(recipe, stream)
        if recipe.objective == "dpo":
            sources: list[Mixture | TokenDataset] = [mixture, *validation.values()]
            passes = [reference_pass(recipe, source, world) for source in sources]
            with watchdog.paused():
                engine.objective = pair_objective(recipe, engine, base, resume, passes, folder.path, world, display.say)

        def measure() -> dict[str, dict[str, float]] | None:
            """Figures of each validation set with the weights as they are, or None where a signal cut it short."""
            engine.model.eval()
            results: dict[str, dict[str, float]] = {}
            for name, split in validation.items():
                batches = validation_batches(
                    split,
                    sequence_length=recipe.data.sequence_length,
                    micro_batch=recipe.evaluation.micro_batch or recipe.train.micro_batch,
                    world=world,
                    max_dialogues=recipe.evaluation.max_dialogues,
                )
                figures = evaluate(engine.forward, batches, world, asked, recipe.objective == "dpo")
                if figures is None:
                    return None
                results[name] = figures
            return results

        def measure_average() -> None:
            with engine.averaged_weights():
                results = measure()
            if results is not None:
                result = pooled(list(results.values()))
                if world.is_main:
                    folder.metric(step=state.step, eval_ema=result)
                display.say(f"averaged weights at step {state.step}: {in_words(result)}")

        def validate() -> bool:
            """Measure, log and answer the prompts; True when it is the best validation so far and checkpoints follow it."""
            began = time.monotonic()
            results = measure()
            if results is None:
                display.say(f"validation at step {state.step} was cut short by a signal")
                return False
            result = pooled(list(results.values()))
            if world.is_main:
                each = {"eval_by_data": results} if len(results) > 1 else {}
                folder.metric(step=state.step, eval=result, **each, seconds=round(time.monotonic() - began, 3))
            display.say(f"validation at step {state.step}: {in_words(result)}")
            if recipe.evaluation.ema:
                measure_average()
            for prompt, reply in engine.replies(
                checkpoints.tokenizer, recipe.evaluation.prompts, recipe.evaluation.max_new_tokens
            ):
                if world.is_main:
                    folder.sample(step=state.step, prompt=prompt, reply=reply)
                display.say(f"  > {prompt}\n  < {reply}")
            best = state.step > 0 and state.validated(result, recipe.checkpoint.best or "loss")
            return best and recipe.checkpoint.best is not None

        def preempted() -> int:
            if world.is_main:
                why = f"{stop.name or 'signal on another rank'} at step {state.step}\n"
                (folder.path / PREEMPTED).write_text(why, encoding="utf-8")
                folder.event("preempted", step=state.step, signal=stop.name)
            display.say(f"stopped by a signal after step {state.step}; the same command continues.")
            return state.step

        if state.step == 0 and recipe.evaluation.at_start:
            validate()
        if state.step == 0 and world.any(stop.asked):
            return preempted()
        guard = Guard(recipe.guard, folder, world)
        meter = StepMeter(config, world)
        meter.profiler = StepProfiler(recipe.logging.profile_steps, folder.path / "profile", world, state.step)
        batches = iter(stream)
        evaluated = state.step if resume is None else -1  # a run killed in its last validation still owes it
        best = False
        while state.step < recipe.train.steps and not is_stale(state, recipe):
            watchdog.beat("data", state.step)
            waited = time.monotonic()
            micro = take(batches, recipe.train.accumulation)
            if not micro:  # exclusions made since the steps were counted left less to learn from
                break
            meter.waited(time.monotonic() - waited)
            seen = state.tokens + micro[0].step_tokens
            lr = learning_rate(state.step, recipe.train.steps, recipe.optimizer.lr, recipe.schedule, seen)
            watchdog.beat("forward and backward", state.step)
            sums = engine.forward_backward(micro)
            watchdog.beat("update", state.step)
            loss_sum, stops = world.sum([float(sums.loss_sum), float(stop.asked)])
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
            if guard.decide(finding, loss, state, micro, display.say) == "rollback" and (target := checkpoints.newest()):
                uids = guard.exclude(finding, state, micro, int(target.meta["step"]))
                exclude = merged(exclude, int(target.meta["step"]), uids)
                stream = training_stream(recipe, config, mixture, exclude, world)
                state = checkpoints.restore(target, engine, stream)
                if world.is_main:
                    folder.forget_after(state.step)
                batches = iter(stream)
                meter.restart()
                continue
            meter.stepped(micro)
            if state.step % recipe.logging.every_steps == 0 or state.step == recipe.train.steps:
                line = meter.line(step=state.step, loss=loss, lr=lr, grad_norm=grad_norm, total_tokens=state.tokens)
                if recipe.objective == "dpo":
                    line["accuracy"] = world.sum([float(sums.correct)])[0] / max(1, micro[0].step_examples)
                if world.is_main:
                    folder.metric(**line | overlong_figures(stream))
                display.show(state.step, loss, lr, grad_norm, line["tokens_per_s"])
            best = False
            if recipe.evaluation.every_steps and state.step % recipe.evaluation.every_steps == 0:
                best = validate()
                evaluated = state.step
                meter.restart()
            watchdog.beat("checkpoint", state.step)
            if best or state.step % recipe.checkpoint.every_steps == 0:
                checkpoints.save(engine, stream, state, best)
                meter.restart()
            if stops:
                checkpoints.save_last(engine, stream, state, best)
                return preempted()
        if recipe.evaluation.at_end and evaluated != state.step:
            best = validate()
        checkpoints.save_last(engine, stream, state, best)
        if world.is_main:
            early = {"early_stop": True} if is_stale(state, recipe) else {}
            folder.event("finished", step=state.step, tokens=state.tokens, loss_tokens=state.loss_tokens, **early)
            kept = list_checkpoints(folder.path)[-1]
            display.say(f"finished: {state.step} steps, {state.tokens:,} tokens, checkpoint {kept}")
    return state.step


def build_engine(recipe: Recipe, model: Decoder, world: World) -> Engine:
    """The engine that parallel.strategy names."""
    if recipe.parallel.strategy.startswith("zero"):
        from chatmill.trainer.zero_engine import ZeroEngine

        return ZeroEngine(recipe, model, world)
    return Engine(recipe, model, world)


def check_same_data(mixture: Mixture, world: World) -> None:
    """Refuse to train where a machine's copy of a data set, or its quarantine, is another one. Raises ConfigError."""
    mark = float(int(mixture.identity[:10], 16))  # 40 bits: sums of it are exact in float64
    if world.sum([mark])[0] != mark * world.world_size:
        raise ConfigError(
            f"the ranks read different data or quarantines ({', '.join(mixture.sources)}; here: {mixture.identity[:10]}).\n"
            "Give every machine the same copy."
        )


def training_stream(
    recipe: Recipe, config: ModelConfig, mixture: Mixture, exclude: Mapping[int, frozenset[str]], world: World
) -> PackedStream:
    """The shuffled stream of this rank; on a GPU with the attention kernel's tile plans, made beside the batches."""

    def plans(cu_seqlens: NDArray[np.int32], length: int) -> AttentionPlans:
        def plan(window: int | None) -> DevicePlan:
            return plan_attention(
                cu_seqlens,
                length,
                head_dim=config.d_head,
                dtype=dtype,
                window=window,
                device=world.device,
                impl=recipe.kernels.attention,
            )

        return AttentionPlans({window: plan(window) for window in windows})

    windows = {config.window_of(layer) for layer in range(config.layers)}
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    wants_plans = world.device.type == "cuda" and recipe.kernels.attention in ("auto", "triton", "hopper")
    return PackedStream(
        mixture,
        sequence_length=recipe.data.sequence_length,
        micro_batch=recipe.train.micro_batch,
        accumulation=recipe.train.accumulation,
        rank=world.rank,
        world_size=world.world_size,
        seed=recipe.train.seed,
        overlong=recipe.data.overlong,
        overlap=recipe.data.overlap,
        epochs=recipe.train.epochs,
        max_tokens=recipe.train.tokens,
        max_dialogues=recipe.data.max_dialogues,
        exclude=exclude,
        annotate=plans if wants_plans else None,
        pin=world.device.type == "cuda",
    )


def overlong_figures(stream: PackedStream) -> dict[str, Any]:
    """What became of dialogues longer than a pack, among those planned since this start; nothing where there were none."""
    names = ("dialogues", "overlong", "truncated", "split", "dropped", "cut_inside_turn")
    return {"overlong": {name: stream.counts[name] for name in names}} if stream.counts["overlong"] else {}


def take(batches: Iterator[PackedBatch], count: int) -> list[PackedBatch]:
    """The next micro-batches of one step; none where an epoch or token budget is used up."""
    micro = list(islice(batches, count))
    if micro and len(micro) != count:
        raise ConfigError("the training stream ended inside a step")
    return micro


def is_stale(state: TrainState, recipe: Recipe) -> bool:
    """Whether so many validations in a row brought nothing better that the run ends early (evaluation.patience)."""
    return recipe.evaluation.patience is not None and state.stale_validations >= recipe.evaluation.patience


def merged(exclude: Mapping[int, frozenset[str]], step: int, uids: frozenset[str]) -> dict[int, frozenset[str]]:
    """The exclusions with some more dialogues left out once `step` steps are done."""
    return {**exclude, step: exclude.get(step, frozenset()) | uids}


def say_proof(display: StepDisplay, proof: dict[str, Any], config: ModelConfig, recipe: Recipe) -> None:
    """Print what is really running."""
    display.say(
        f"{config.parameter_counts()['total']:,} parameters  {config.layers} layers x {config.hidden_size}  "
        f"vocabulary {config.vocab_size:,}  pack {recipe.data.sequence_length} tokens"
    )
    display.say(
        f"world size {proof['world_size']}  backend {proof['backend']}  device {proof['device']}  threads {proof['threads']}  "
        f"strategy {proof['strategy']} ({proof['engine']}, sharded {proof['sharded_parameters']})"
    )
    display.say(
        f"parameters {proof['parameter_dtype']}  compute {proof['compute_dtype']}  gradients {proof['gradient_dtype']}  "
        f"reduce {proof['reduce_dtype']}  loss {proof['loss_dtype']}  optimizer {proof['optimizer']}"
    )
    extras = [f"{name} {proof[name]}" for name in ("offload", "activation_checkpointing", "compile", "ema")]
    display.say(f"sharding {proof['sharding']}  " + "  ".join(extras))


class AttentionPlans(dict[int | None, DevicePlan]):
    """One tile plan per sliding window that the model's layers use; moves to the device with its batch."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionPlans:
        """Copies on `device`."""
        return AttentionPlans({window: plan.to(device, non_blocking) for window, plan in self.items()})

    def pin_memory(self) -> AttentionPlans:
        """Copies in page-locked memory."""
        return AttentionPlans({window: plan.pin_memory() for window, plan in self.items()})


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 came; the loop asks at each step boundary."""

    def __init__(self) -> None:
        self.asked = False
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.name = signal.Signals(number).name
