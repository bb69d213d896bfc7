"""Recipes: every setting of a training run, validated before anything is loaded.

A recipe is a YAML file (or the name of a shipped one) plus dotted overrides:

    chatmill train tiny optimizer.lr=3e-4 train.steps=200

Imports neither torch nor numpy: login nodes and `chatmill --help` use this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from chatmill.config import Section, load_section

from ..data.packing.config import SourcesSection
from .adapter_config import QUANTISED, AdapterSection, Precision
from .model_config import KernelSection, ModelConfig
from .parallel_config import ParallelSection

RECIPES = Path(__file__).resolve().parent / "recipes"


class ModelSection(ModelConfig):
    """`model.*` of a recipe: a checkpoint to start from, or the shape of a new model with random weights.

    checkpoint: a Chatmill checkpoint folder. Its own shape is used; a shape field written beside it must agree.
    impl: who computes the layers: our decoder (own), transformers, or whichever the checkpoint was imported for (auto).
    base_precision: of the matrices that stay frozen (adapter, train.freeze): 4 bits (nf4) or 8 (int8) through bitsandbytes.
    """

    checkpoint: str | None = None
    impl: Literal["auto", "own", "transformers"] = "auto"
    base_precision: Precision = "fp32"

    def shape(self) -> ModelConfig:
        """The shape alone, without the checkpoint field."""
        return ModelConfig(**{name: getattr(self, name) for name in ModelConfig.model_fields})


class RunSection(Section):
    """Where a run writes. The run folder is dir/name."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    dir: str = "runs"


class DataSection(SourcesSection):
    """The token shards to train on: path, or mix, curriculum and exclude (data/packing/config.py, docs/stream.md).

    path: a data-set folder made by `chatmill data build` (it holds train/ and validation/).
    sequence_length: tokens per pack. overlong: longer dialogues are cut at a whole turn, split into pieces that share
    `overlap` tokens of context, or dropped.
    max_dialogues: use only the first N dialogues (null: all).
    """

    sequence_length: int = Field(default=1024, gt=1)
    overlong: Literal["truncate", "split", "drop"] = "truncate"
    overlap: int = Field(default=0, ge=0)
    max_dialogues: int | None = Field(default=None, gt=0)


class GroupRule(Section):
    """Factors on optimizer.lr and optimizer.weight_decay for a group of parameters."""

    lr: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=1.0, ge=0)


class MuonSection(Section):
    """Muon on the matrices of the layers (arXiv:2502.16982); AdamW takes the rest.

    iterations: Newton-Schulz steps. scale: `adamw` gives updates the size of AdamW's (0.2 sqrt(max(m, n))), so that one
    learning rate and decay serve both; `spectral` is the original sqrt(max(1, m/n)), with a learning rate of its own size.
    """

    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    iterations: int = Field(default=5, gt=0, lt=100)
    scale: Literal["adamw", "spectral"] = "adamw"


class OptimizerSection(Section):
    """AdamW, Muon (with AdamW beside it), or AdamW with 8-bit moments. Weight decay is decoupled.

    decay_embeddings: also decay embeddings; decay_norms: also norms and biases. groups: factors by parameter-name pattern
    (`layers.0.*`, `*.attention.*`); the first pattern that matches counts. clip_norm: largest gradient norm (null: no
    clipping).
    """

    name: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    decay_embeddings: bool = False
    decay_norms: bool = False
    groups: dict[str, GroupRule] = Field(default_factory=dict)
    muon: MuonSection = MuonSection()
    clip_norm: float | None = Field(default=1.0, gt=0)


class ScheduleSection(Section):
    """Learning rate over the run: linear warm-up, then the named decay down to min_ratio x lr.

    unit: `steps` (warmup_steps, train.steps) or `tokens` (warmup_tokens, total_tokens; padding does not count).
    total_tokens: the number over which the rate falls; null: the budget of the run (train.tokens or train.epochs).
    wsd: warm-up, stable, then a linear decay over the last decay_fraction. inverse_sqrt: lr sqrt(warm-up / position).
    """

    name: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    unit: Literal["steps", "tokens"] = "steps"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_tokens: int = Field(default=0, ge=0)
    total_tokens: int | None = Field(default=None, gt=0)
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)

    @model_validator(mode="after")
    def _check_unit(self) -> ScheduleSection:
        if self.unit == "steps" and (self.warmup_tokens or self.total_tokens is not None):
            raise ValueError("warmup_tokens and total_tokens need schedule.unit=tokens")
        if self.unit == "tokens" and self.warmup_steps:
            raise ValueError("schedule.unit=tokens takes warmup_tokens, not warmup_steps")
        if self.name == "inverse_sqrt" and not (self.warmup_steps or self.warmup_tokens):
            raise ValueError("inverse_sqrt falls from the end of the warm-up: set warmup_steps (or warmup_tokens)")
        return self


class PreferenceSection(Section):
    """Objective dpo (trainer/loop/dpo.py). beta: how closely the reference is kept; length_normalised: per reply token."""

    beta: float = Field(default=0.1, gt=0)
    length_normalised: bool = False
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)


class TrainSection(Section):
    """The loop. One step = world size / parallel.context x accumulation x micro_batch packs of data.sequence_length tokens.

    epochs, tokens: a budget instead of steps: how often each data set is used, or how many tokens in all (padding not
    counted). The number of steps is worked out before the first one. Of several budgets the first one reached ends the run.
    activation_checkpointing: recompute each layer in the backward pass: true or `full` keeps its input only, `selective`
    keeps the attention's result too. activation_checkpointing_layers: only the first N layers (null: all).
    compile: torch.compile each layer (compile_backend: `inductor` needs a C++ compiler).
    ema: decay per step of an fp32 average of the weights, kept in checkpoints (null: none; 0.999 is usual).
    hang_timeout_s: a run in which nothing moves for this long is ended, and the rank that hangs is named (0: never).
    freeze: patterns of parameter names that are not trained (`embed.weight`, `layers.[0-9].*`), without an adapter.
    cpu_threads: threads of each process on a CPU (null: OMP_NUM_THREADS, else all cores, shared by the machine's processes).
    """

    steps: int = Field(default=100, gt=0)
    epochs: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    micro_batch: int = Field(default=1, gt=0)
    accumulation: int = Field(default=1, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = Field(default=0, ge=0)
    activation_checkpointing: bool | Literal["full", "selective"] = False
    activation_checkpointing_layers: int | None = Field(default=None, ge=1)
    compile: bool = False
    compile_backend: str = "inductor"
    ema: float | None = Field(default=None, gt=0, lt=1)
    freeze: tuple[str, ...] = ()
    cpu_threads: int | None = Field(default=None, gt=0)
    hang_timeout_s: float = Field(default=900.0, ge=0)


class CheckpointSection(Section):
    """Checkpoints in the run folder. keep: how many of the newest are kept (the best and the last always are).

    keep_every_steps: checkpoints at its multiples are kept for good (null: none). best: also keep the checkpoint of the best
    validation; a validation that beats all earlier ones is then followed by a save. asynchronous: write in a thread while
    training goes on.
    """

    every_steps: int = Field(default=100, gt=0)
    keep: int = Field(default=2, gt=0)
    keep_every_steps: int | None = Field(default=None, gt=0)
    best: Literal["loss", "accuracy"] | None = None
    asynchronous: bool = True


class GuardSection(Section):
    """What to do about a bad step (trainer/run/guard.py); every rank decides alike.

    on_nan: the loss or the gradient is NaN or infinite. on_spike: the loss is more than spike_z robust deviations above the
    last `window` steps. `skip` leaves the update out (after max_skips in a row the run stops); `rollback` goes back to the
    newest checkpoint and leaves out the dialogues of the batch from there on (max_rollbacks times); `warn` only reports it.
    min_history: steps before the search for spikes begins.
    """

    on_nan: Literal["skip", "rollback", "stop"] = "skip"
    on_spike: Literal["off", "warn", "skip", "rollback", "stop"] = "warn"
    spike_z: float = Field(default=12.0, gt=0)
    window: int = Field(default=128, gt=1)
    min_history: int = Field(default=32, gt=1)
    max_skips: int = Field(default=3, ge=0)
    max_rollbacks: int = Field(default=3, ge=0)


class EvaluationSection(Section):
    """Validation during training: every `every_steps` steps (0: never) and at both ends.

    data: names of data.mix, or data-set folders, whose validation splits are measured (empty: those of all training data sets).
    With several, the figures are those of all tokens together, with each data set's own beside them.
    patience: end the run after this many validations in a row without a better checkpoint.best (or loss).
    prompts: answered at each validation (sampled, with a fixed seed); the replies go to samples.jsonl and the report.
    ema: measure the averaged weights (train.ema) too; their figures are `eval_ema` in metrics.jsonl.
    """

    every_steps: int = Field(default=0, ge=0)
    data: tuple[str, ...] = ()
    ema: bool = False
    max_dialogues: int | None = Field(default=None, gt=0)
    micro_batch: int | None = Field(default=None, gt=0)
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = Field(default=48, gt=0)
    patience: int | None = Field(default=None, gt=0)
    at_start: bool = True
    at_end: bool = True


class LoggingSection(Section):
    """One console and metrics line every `every_steps` steps (docs/metrics.md).

    trackers: beside metrics.jsonl: tensorboard, wandb, trackio, mlflow ... (null: tensorboard if it is installed).
    profile_steps: the first and the last step to profile into RUN/profile (null: none).
    """

    every_steps: int = Field(default=1, gt=0)
    trackers: tuple[str, ...] | None = None
    profile_steps: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _check_profile(self) -> LoggingSection:
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)}: expected [first, last] with 1 <= first <= last")
        return self


class Recipe(Section):
    """A whole training run. objective: sft (likelihood of the supervised tokens) or dpo (preference pairs).

    adapter: train small matrices beside a frozen base (null: train all weights).
    """

    run: RunSection = RunSection()
    objective: Literal["sft", "dpo"] = "sft"
    preference: PreferenceSection = PreferenceSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    adapter: AdapterSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    kernels: KernelSection = KernelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    guard: GuardSection = GuardSection()
    logging: LoggingSection = LoggingSection()

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.dir) / self.run.name

    @model_validator(mode="after")
    def _check_lengths(self) -> Recipe:
        if self.objective == "dpo" and self.model.checkpoint is None:
            raise ValueError("objective=dpo starts from a trained model: set model.checkpoint")
        if self.model.impl == "transformers" and self.model.checkpoint is None:
            raise ValueError(
                "model.impl=transformers trains a model that was imported: set model.checkpoint to the folder of "
                "`chatmill import SOURCE FOLDER --impl transformers`"
            )
        if self.objective == "dpo" and self.data.overlong != "drop":
            raise ValueError("objective=dpo needs data.overlong=drop: half a preference pair teaches nothing")
        if self.model.checkpoint is None and self.data.sequence_length > self.model.context:
            raise ValueError(f"data.sequence_length={self.data.sequence_length} exceeds model.context={self.model.context}")
        if self.data.sequence_length % self.parallel.context:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} is not a multiple of parallel.context="
                f"{self.parallel.context}: every process takes as many tokens of a pack as the others"
            )
        return self

    @property
    def schedule_tokens(self) -> int | None:
        """Tokens over which the learning rate falls; None with schedule.unit=steps, or before epochs are counted."""
        return (self.schedule.total_tokens or self.train.tokens) if self.schedule.unit == "tokens" else None

    @model_validator(mode="after")
    def _check_schedule(self) -> Recipe:
        if self.schedule.unit == "tokens" and self.schedule_tokens is None and self.train.epochs is None:
            raise ValueError(
                "schedule.unit=tokens needs the tokens over which the rate falls: set train.tokens (the budget of the run), "
                "train.epochs or schedule.total_tokens"
            )
        if self.schedule_tokens is not None and self.schedule.warmup_tokens >= self.schedule_tokens:
            name = "train.tokens" if self.schedule.total_tokens is None else "schedule.total_tokens"
            raise ValueError(
                f"schedule.warmup_tokens={self.schedule.warmup_tokens} leaves nothing of {name}={self.schedule_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Recipe:
        zero = self.parallel.strategy.startswith("zero")
        if zero and self.optimizer.name == "adamw8bit":
            raise ValueError(
                "optimizer.name=adamw8bit keeps one scale per block of a row, but ZeRO cuts weights in the middle of blocks: "
                "use parallel.strategy=fsdp2, or optimizer.name=adamw (ZeRO divides its moments among the processes anyway)"
            )
        if self.optimizer.name == "muon" and self.parallel.offload == "nvme":
            raise ValueError(
                "optimizer.name=muon with parallel.offload=nvme is not supported: its momentum was never swapped to a disk in "
                "a test; use parallel.offload=cpu"
            )
        if self.train.ema is not None and self.parallel.offload == "nvme":
            raise ValueError("train.ema with parallel.offload=nvme is not supported: the average has no place in memory")
        if self.evaluation.ema and self.train.ema is None:
            raise ValueError("evaluation.ema needs train.ema, the decay of the average")
        return self

    @model_validator(mode="after")
    def _check_frozen(self) -> Recipe:
        if problem := frozen_problem(self):
            raise ValueError(problem)
        return self


def frozen_problem(recipe: Recipe) -> str:
    """Why a frozen base, its precision and the engine do not go together, or ""."""
    adapter, precision, zero = recipe.adapter, recipe.model.base_precision, recipe.parallel.strategy.startswith("zero")
    if adapter is not None and recipe.train.freeze:
        return (
            "an adapter freezes its whole base already: leave train.freeze out; adapter.train names what is trained beside it"
        )
    if adapter is not None and recipe.model.checkpoint is None:
        return "an adapter needs the model that it changes: set model.checkpoint"
    if precision != "fp32" and adapter is None and not recipe.train.freeze:
        return f"model.base_precision={precision} is for frozen weights: set adapter or train.freeze, or leave it out"
    if precision in QUANTISED and adapter is None:
        return f"model.base_precision={precision} needs an adapter: a checkpoint cannot hold whole weights in this form"
    if precision in QUANTISED and zero:
        return f"model.base_precision={precision} with DeepSpeed is not supported: use parallel.strategy=fsdp2, ddp or single"
    if precision == "bf16" and recipe.parallel.strategy == "zero3" and recipe.train.precision == "fp32":
        return (
            "model.base_precision=bf16 with train.precision=fp32 is not supported by zero3: use fsdp2, or train.precision=bf16"
        )
    if recipe.train.freeze and zero and recipe.train.precision == "bf16" and precision == "fp32":
        return (
            "DeepSpeed keeps frozen weights in train.precision: set model.base_precision=bf16, or use parallel.strategy=fsdp2"
        )
    if recipe.parallel.offload == "nvme" and (adapter is not None or recipe.train.freeze):
        return "frozen weights with parallel.offload=nvme are not supported: use parallel.offload=cpu"
    if adapter is not None and adapter.train and recipe.objective == "dpo":
        return "objective=dpo takes the base with the adapter off as its reference: adapter.train would change that base"
    if adapter is not None and adapter.dropout and recipe.train.compile and recipe.train.activation_checkpointing:
        return "adapter.dropout with train.compile and train.activation_checkpointing is not supported: leave one of them out"
    return ""


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The training recipe `name` with overrides applied."""
    return load_section(Recipe, name, overrides, RECIPES)
