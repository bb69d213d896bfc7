"""DeepSpeed ZeRO stages 1, 2 and 3 behind the same interface as the other engines.

    stage 1 shards the optimizer's state over ranks, stage 2 the gradients too, stage 3 the parameters too

DeepSpeed's own checkpoint format is tied to the world size that wrote it. Here the full fp32 weights and Adam moments are
gathered one tensor at a time, so that a checkpoint is the same as every other engine's and loads into any of them.
Muon works on whole matrices, which travel to an owner and back (zero_muon.py).
Source: Rajbhandari et al., "ZeRO", arXiv:1910.02054. Install: pip install 'chatmill[gpu]'.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatmill.config import ConfigError

from ...data.stream import PackedBatch
from ..checkpoint.files import Share
from ..checkpoint.sharding import TensorSource, shares_of, states_by_parameter
from ..config import Recipe
from ..distributed.world import World
from ..model.decoder import Decoder
from ..optim.ema import GROUP, PREFIX, WeightAverage
from ..optim.optimizer import build_optimizer, expected_keys, set_rate, wrong_state
from ..optim.zero_muon import SlicedMatrix, ZeroMuon, slices_of
from .engine import Engine, StepSums, check_average

_NOTHING = torch.empty(0)


LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default


def zero_config(recipe: Recipe, stage: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe and a model of so many elements.

    DeepSpeed allocates the whole bucket in which it collects gradients, 2 GB of fp32 by default, however small the model is.
    (Its bucket for gathering weights is only a limit.)
    """
    bf16 = recipe.train.precision == "bf16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch,
        "gradient_accumulation_steps": recipe.train.accumulation,
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": False,
            "reduce_bucket_size": min(elements, LARGEST_BUCKET),
        },
        "zero_allow_untested_optimizer": True,  # torch's own AdamW, or Muon, as in every other engine
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 30,
        "bf16": {"enabled": bf16},
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if recipe.optimizer.clip_norm is not None:
        config["gradient_clipping"] = recipe.optimizer.clip_norm
    parallel = recipe.parallel
    if parallel.offload != "none":
        place: dict[str, Any] = {"device": parallel.offload, "pin_memory": torch.cuda.is_available()}
        if parallel.nvme_path is not None:
            place["nvme_path"] = parallel.nvme_path
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW steps on the CPU; DeepSpeed's own compiles C++
        config["zero_optimization"]["offload_optimizer"] = place
        if stage == 3:
            config["zero_optimization"]["offload_param"] = dict(place)
    return config


class ZeroEngine(Engine):
    """A model in a DeepSpeedEngine; torch's AdamW, or Muon beside it, steps on the local shards."""

    def __init__(self, recipe: Recipe, model: Decoder, world: World) -> None:
        self.recipe, self.world, self.decoder = recipe, world, model
        self.objective = None
        self.stage = int(recipe.parallel.strategy.removeprefix("zero"))
        deepspeed = _import_deepspeed()
        if recipe.parallel.offload == "nvme":
            check_nvme(Path(recipe.parallel.nvme_path or ""))
        model.to(world.device)
        if recipe.train.compile:
            model.compile_layers(recipe.train.compile_backend)
        optimizer = build_optimizer(model, recipe.optimizer, recipe.train.precision, flat=True)
        self.names = [name for name, _ in model.named_parameters()]
        self._groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._muon_groups = {i for i, group in enumerate(optimizer.param_groups) if group["muon"]}
        config = zero_config(recipe, self.stage, sum(p.numel() for p in model.parameters()))
        with _swapping_as_computed(deepspeed, recipe):
            engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.model: nn.Module = engine
        self.deepspeed = engine
        self.zero = engine.optimizer
        self.optimizer = optimizer
        if isinstance(optimizer, ZeroMuon):
            optimizer.place(self._matrices(), world.device)
        decay = recipe.train.ema
        self.average = WeightAverage(self._flat_partitions(), decay) if decay is not None else None

    def describe(self) -> dict[str, Any]:
        """The proof of the start; refuses an engine that is not the stage that was asked for."""
        found = self.deepspeed.zero_optimization_stage()
        if found != self.stage:
            raise ConfigError(f"DeepSpeed runs ZeRO stage {found}, the recipe asks for stage {self.stage}")
        parameters = list(self.decoder.parameters())
        sharded = sum(hasattr(p, "ds_id") for p in parameters)
        if sharded != (len(parameters) if self.stage == 3 else 0):
            raise ConfigError(f"ZeRO stage {self.stage}: {sharded} of {len(parameters)} parameters are sharded")
        compute, accumulate = self.deepspeed.get_data_types()
        reduce = self.deepspeed.communication_data_type
        expected = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        if (compute, accumulate, reduce) != (expected, torch.float32, torch.float32):
            raise ConfigError(
                f"DeepSpeed computes in {compute}, accumulates in {accumulate} and reduces in {reduce}; "
                f"expected {expected}, float32 and float32"
            )
        on_disk = {swapper.dtype for p in parameters if (swapper := getattr(p, "nvme_swapper", None)) is not None}
        if on_disk - {expected}:
            raise ConfigError(f"DeepSpeed keeps weights on the disk as {on_disk}; expected {expected}")
        parts = ("optimizer", "optimizer and gradients", "optimizer, gradients and parameters")[self.stage - 1]
        return self.facts(
            engine=f"{type(self.deepspeed).__name__}/{type(self.zero).__name__}",
            sharded_parameters=f"{sharded} of {len(parameters)}",
            sharding=f"{parts}: {self.world.world_size} shard(s)",
            optimizer=f"{type(self.optimizer).__name__} (fp32 state, ZeRO-{self.stage})",
        )

    def masters(self) -> list[Tensor]:
        """This rank's flat partitions of the fp32 weights."""
        return self._flat_partitions()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """DeepSpeed holds the bf16 copy of the weights itself."""
        return contextlib.nullcontext()

    def forward_backward(self, batches: Sequence[PackedBatch]) -> StepSums:
        """Gradients of one step; DeepSpeed reduces on the last micro-batch. The last `step` call updates."""
        self.model.train()
        scale = self.world.world_size / max(1, batches[0].step_examples)
        sums: StepSums | None = None
        for i, batch in enumerate(batches):
            output = self.forward(batch)
            self.deepspeed.backward(output.loss_sum * scale, scale_wrt_gas=False)
            loss, correct = output.loss_sum.detach(), output.correct.detach()
            sums = StepSums(loss, correct) if sums is None else StepSums(sums.loss_sum + loss, sums.correct + correct)
            if i + 1 < len(batches):
                self.deepspeed.step()  # counts the micro-batch; nothing is updated before the last one
        assert sums is not None
        return sums

    def clip(self) -> None:
        """Nothing here: DeepSpeed clips in its step."""

    def step(self, lr: float) -> float:
        """Clip, update, zero (all inside DeepSpeed); returns the gradient norm before clipping."""
        set_rate(self.optimizer, lr)
        self.deepspeed.step()
        if self.average is not None and not self.zero.overflow:
            self.average.update()
        return float(self.deepspeed.get_global_grad_norm())

    def _exchange(self) -> None:
        """Swap the masters with their average, then round the low-precision copies from them as DeepSpeed does."""
        assert self.average is not None
        self.average.exchange()
        self._refresh()

    def _refresh(self) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in self.decoder.parameters():
            self._set_copy(parameter, safe_get_full_fp32_param(parameter).detach().reshape(_shape(parameter)))

    def _set_copy(self, parameter: nn.Parameter, value: Tensor | None) -> None:
        """Set the weights that the forward pass uses; the masters stay. In stage 3 only rank 0's value counts."""
        import deepspeed

        gather = deepspeed.zero.GatheredParameters(parameter, modifier_rank=0) if self.stage == 3 else contextlib.nullcontext()
        with gather:
            if value is not None:
                parameter.data.copy_(value)

    def shares(self) -> Iterator[Share]:
        """This rank's elements of the fp32 weights and of the optimizer's state, as ZeRO cut them; no communication."""
        named = list(zip(self.names, self.decoder.parameters(), strict=True))
        for name, parameter in named:
            yield from self._share("model", name, parameter, None)
        if self._has_state():
            yield from self._state_shares(named)
        if self.average is not None:
            self.average.exchange()  # into the masters' places, because only DeepSpeed knows how it cuts them
            try:
                for name, parameter in named:
                    for share in self._share(GROUP, PREFIX + name, parameter, None):
                        yield replace(share, tensor=share.tensor.clone())
            finally:
                self.average.exchange()

    def _state_shares(self, named: list[tuple[str, nn.Parameter]]) -> Iterator[Share]:
        self._link_states()
        whole: list[tuple[str, str, Tensor]] = []
        for name, parameter in named:
            for key, value in self.optimizer.state[self._flat_of(parameter)].items():
                if isinstance(value, Tensor) and value.ndim:
                    yield from self._share("optimizer", f"{name}.{key}", parameter, key)
                else:
                    whole.append(("optimizer", f"{name}.{key}", torch.as_tensor(value, dtype=torch.float32)))
        yield from shares_of(whole, self.world.rank, self.world.world_size)

    def _share(self, group: str, name: str, parameter: Tensor, key: str | None) -> Iterator[Share]:
        """This rank's piece of the master weight (key None) or of a state of one parameter; nothing where it holds none."""
        found = self._local_piece(parameter, key)
        if found is not None:
            start, values = found
            yield Share(group, name, tuple(_shape(parameter)), start, values)

    def _local_piece(self, parameter: Tensor, key: str | None) -> tuple[int, Tensor] | None:
        """(first element, this rank's elements) of the master weight or of a state; stage 3 pads the last rank's, cut here."""
        if self.stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        values = safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
        start = self.world.rank * values.numel()
        length = max(0, min(values.numel(), _shape(parameter).numel() - start))
        return (start, values.detach().flatten()[:length]) if length else None

    def load_model(self, source: TensorSource) -> None:
        """Set the fp32 master weights exactly, and the low-precision copies from them; the average starts from them."""
        for name, parameter in zip(self.names, self.decoder.parameters(), strict=True):
            if source.shape(name) != tuple(_shape(parameter)):
                raise ConfigError(f"checkpoint: {name} has shape {source.shape(name)}, expected {tuple(_shape(parameter))}")
            self._read_piece(source, name, parameter, None)
            if self.stage < 3 or self.world.is_main:  # stage 3: the others get their part from rank 0
                self._set_copy(parameter, source.tensor(name))
            else:
                self._set_copy(parameter, None)
        if self.average is not None:
            self.average.reset()

    def load_average(self, source: TensorSource) -> None:
        """Set the averaged weights: through the masters' places, because only DeepSpeed knows how it cuts them."""
        assert self.average is not None
        check_average(source, self.names)
        self.average.exchange()
        for name, parameter in zip(self.names, self.decoder.parameters(), strict=True):
            self._read_piece(source, PREFIX + name, parameter, None)
        self.average.exchange()

    def load_optimizer(self, source: TensorSource) -> None:
        """Restore the optimizer's state, whoever wrote it; each rank reads its own elements. Raises ConfigError."""
        stored = states_by_parameter(source)
        if sorted(stored) != sorted(self.names):
            raise ConfigError("the checkpoint does not hold the optimizer state of this model: it cannot continue a run")
        known: set[Tensor] = set()
        for name, parameter in zip(self.names, self.decoder.parameters(), strict=True):
            wanted = expected_keys(self._groups[id(parameter)] in self._muon_groups)
            if set(stored[name]) != set(wanted):
                raise wrong_state(self.optimizer, name, stored[name], wanted)
            flat = self._flat_of(parameter)
            if flat not in known:
                known.add(flat)
                counts = {key: source.tensor(f"{name}.{key}") for key in wanted if not len(source.shape(f"{name}.{key}"))}
                self._make_state(flat, counts, [key for key in wanted if key not in counts])
        self._link_states()
        for name, parameter in zip(self.names, self.decoder.parameters(), strict=True):
            for key in stored[name]:
                if len(source.shape(f"{name}.{key}")):
                    self._read_piece(source, f"{name}.{key}", parameter, key)

    def _make_state(self, flat: Tensor, counts: dict[str, Tensor], moments: list[str]) -> None:
        """Give a flat partition its state: these counts, and moments to be read into, on the disk where they live there."""
        group = next(i for i, held in enumerate(self._flat_partitions()) if held is flat)
        swapped = self.stage == 3 and self.zero._swappable_optimizer_subgroup(group)
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_in(group)
        if not (swapped and self.optimizer.state[flat]):  # what is swapped already is known to the swapper by its tensors
            self.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in moments}
        self.optimizer.state[flat] |= {key: value.to(flat.device).clone() for key, value in counts.items()}
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_out(group)

    def _read_piece(self, source: TensorSource, name: str, parameter: Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if self.stage < 3:
            found = self._local_piece(parameter, key)
            if found is not None:
                start, values = found
                values.data.copy_(source.read(name, start, start + values.numel()))
            return
        held, total = parameter.ds_tensor.ds_numel, _shape(parameter).numel()  # type: ignore[attr-defined]
        start = min(self.world.rank * held, total)
        values = torch.zeros(held, dtype=torch.float32)
        length = min(held, total - start)
        values[:length] = source.read(name, start, start + length)
        if key is None:
            safe_set_local_fp32_param(parameter, values)
        else:
            safe_set_local_optimizer_state(parameter, values, key)

    def discard(self) -> None:
        """Throw the gradients of this step away: DeepSpeed does so itself on an overflow, so it is told that there was one."""
        hook = "check_overflow" if self.stage < 3 else "_overflow_check_and_loss_scale_update"

        def overflow(*args: Any, **options: Any) -> bool:
            self.zero.overflow = True
            return True

        if self.stage < 3:
            self.zero.check_grad_overflow = True
        setattr(self.zero, hook, overflow)
        try:
            self.deepspeed.step()
        finally:
            delattr(self.zero, hook)

    def _flat_partitions(self) -> list[Tensor]:
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return list(next(getattr(self.zero, name) for name in names if hasattr(self.zero, name)))

    def _place_of(self, parameter: Tensor) -> tuple[int, int]:
        """(which flat partition, where in it this rank's run of the parameter begins)."""
        if self.stage == 3:
            index, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            return int(index), int(offset)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return self._groups[id(parameter)], mapping.hp_fragment_address.start if mapping is not None else 0

    def _flat_of(self, parameter: Tensor) -> Tensor:
        return self._flat_partitions()[self._place_of(parameter)[0]]

    def _matrices(self) -> dict[int, list[SlicedMatrix]]:
        """The matrices of each of Muon's flat partitions: every rank tells which elements it holds. Collective."""
        chosen = [p for p in self.decoder.parameters() if self._groups[id(p)] in self._muon_groups]
        pieces = [self._local_piece(parameter, None) for parameter in chosen]
        runs = self.world.gather([(start, values.numel()) for start, values in (piece or (0, _NOTHING) for piece in pieces)])
        found: dict[int, list[SlicedMatrix]] = {}
        for i, parameter in enumerate(chosen):
            flat, shape = self._flat_of(parameter), _shape(parameter)
            matrix = slices_of((shape[0], shape[1]), self._place_of(parameter)[1], [held[i] for held in runs])
            found.setdefault(id(flat), []).append(matrix)
        return found

    def _link_states(self) -> None:
        """Let DeepSpeed find each parameter's moments: it links once, and AdamW makes them later than that."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _states(self) -> list[dict[str, Tensor]]:
        return [self.optimizer.state[flat] for flat in self._flat_partitions() if flat in self.optimizer.state]

    def _has_state(self) -> bool:
        return any(self._states())


@contextlib.contextmanager
def _swapping_as_computed(deepspeed: Any, recipe: Recipe) -> Iterator[None]:
    """Keep fp32 weights on the disk as fp32 where the processor has no fp16, a CPU among them.

    DeepSpeed 0.19.8 (runtime/zero/partition_parameters.py:409) reads `dtype or fp16 if fp16_supported else bf16` and
    rounds them to bf16 there, whatever dtype was given: losses were off by 2e-5 before the first update.
    """
    accelerator = deepspeed.accelerator.get_accelerator()
    if recipe.parallel.offload != "nvme" or recipe.train.precision == "bf16" or accelerator.is_fp16_supported():
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def check_nvme(folder: Path) -> None:
    """Refuse NVMe offload where DeepSpeed cannot do it: it needs libaio and a folder to write to. Raises ConfigError."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "parallel.offload=nvme needs DeepSpeed's async_io, which needs libaio with its headers and a C++ compiler.\n"
            "Install it (Debian: libaio-dev), or use parallel.offload=cpu."
        )
    if not folder.is_dir():
        raise ConfigError(f"parallel.nvme_path={folder} is not a folder on this machine: make it on a local disk of every node")


def _shape(parameter: Tensor) -> torch.Size:
    """Full shape of a parameter, also where ZeRO-3 keeps a shard only."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "parallel.strategy=zero* needs DeepSpeed, which is not installed.\n"
            "Install it with: DS_BUILD_OPS=0 pip install --no-build-isolation 'chatmill[gpu]', or use parallel.strategy=fsdp2."
        ) from error
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 calls deprecated, which fills a log with one warning per call
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # would compile C++ for a minute at the first start on a CPU
    return deepspeed
