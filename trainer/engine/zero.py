"""The engine for DeepSpeed ZeRO stages 1, 2 and 3.

    stage 1 shards the optimizer's state over ranks, stage 2 the gradients too, stage 3 the parameters too

DeepSpeed's own checkpoint format is tied to the world size that wrote it. Here each rank gives its elements of the fp32 weights
and of the optimizer's state, so that a checkpoint is the same as every other engine's and loads into any of them.
Muon works on whole matrices, which travel to an owner and back (zero_muon.py).
Source: Rajbhandari et al., "ZeRO", arXiv:1910.02054. Install: pip install 'chatmill[gpu]'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatmill.config import ConfigError

from ...data.stream import PackedBatch
from ..adapters.prepare import frozen_parameters, kept_parameters, trained_parameters
from ..checkpoint.files import Share
from ..checkpoint.sharding import TensorSource, copy_from, shares_of, states_by_parameter
from ..config import Recipe
from ..distributed.world import World
from ..model.language_model import LanguageModel, LossOutput
from ..optim.ema import GROUP, PREFIX, WeightAverage, swapped
from ..optim.optimizer import build_optimizer, expected_keys, set_rate, wrong_state
from ..optim.zero_muon import SlicedMatrix, ZeroMuon, slices_of
from ..parallel.context import join_context
from ..parallel.grid import device_mesh
from ..parallel_config import grid_of
from .deepspeed_setup import check_nvme, import_deepspeed, swapping_as_computed, zero_config
from .engine import Objective, StepSums, check_average, proof, run_model, sum_micro_batches

_NOTHING = torch.empty(0)


class ZeroEngine:
    """A model in a DeepSpeedEngine; torch's AdamW (and Muon) step on the local shards. See the protocol Engine."""

    def __init__(self, recipe: Recipe, model: LanguageModel, world: World) -> None:
        self.recipe, self.world, self.decoder = recipe, world, model
        self.objective: Callable[[PackedBatch], Objective] | None = None
        self.stage = int(recipe.parallel.strategy.removeprefix("zero"))
        self.gathers = self.stage == 3
        self._library = import_deepspeed()
        if recipe.parallel.context > 1:
            model.context = join_context(
                recipe, model.config, device_mesh(grid_of(recipe.parallel, world.world_size), world.device.type)
            )
        if recipe.parallel.offload == "nvme":
            check_nvme(Path(recipe.parallel.nvme_path or ""))
        model.to(world.device)
        if recipe.train.compile:
            model.compile_layers(recipe.train.compile_backend)
        self.optimizer = build_optimizer(model, recipe.optimizer, recipe.train.precision, flat=True)
        self._named = trained_parameters(model)
        self._frozen = frozen_parameters(model)
        groups = self.optimizer.param_groups
        self._groups = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self._muon_groups = {i for i, group in enumerate(groups) if group["muon"]}
        config = zero_config(recipe, self.stage, sum(p.numel() for _, p in self._named))
        with swapping_as_computed(self._library, recipe):
            self.model, *_ = self._library.initialize(model=model, optimizer=self.optimizer, config=config)
        self.zero = self.model.optimizer
        if isinstance(self.optimizer, ZeroMuon):
            self.optimizer.place(self._matrices(), world.device)
        decay = recipe.train.ema
        self.average = WeightAverage(self._flat_partitions(), decay) if decay is not None else None

    def describe(self) -> dict[str, Any]:
        found = self.model.zero_optimization_stage()
        if found != self.stage:
            raise ConfigError(f"DeepSpeed runs ZeRO stage {found}, the recipe asks for stage {self.stage}")
        parameters = list(self.decoder.parameters())
        sharded = sum(hasattr(p, "ds_id") for p in parameters)
        if sharded != (len(parameters) if self.stage == 3 else 0):
            raise ConfigError(f"ZeRO stage {self.stage}: {sharded} of {len(parameters)} parameters are sharded")
        compute, accumulate = self.model.get_data_types()
        reduce = self.model.communication_data_type
        expected = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        if (compute, accumulate, reduce) != (expected, torch.float32, torch.float32):
            raise ConfigError(
                f"DeepSpeed computes in {compute}, accumulates in {accumulate} and reduces in {reduce}; "
                f"expected {expected}, float32 and float32"
            )
        on_disk = {swapper.dtype for p in parameters if (swapper := getattr(p, "nvme_swapper", None)) is not None}
        if on_disk - {expected}:
            raise ConfigError(f"DeepSpeed keeps weights on disk as {on_disk}; expected {expected}")
        parts = ("optimizer", "optimizer and gradients", "optimizer, gradients and parameters")[self.stage - 1]
        return proof(
            self,
            self._flat_partitions(),
            engine=f"{type(self.model).__name__}/{type(self.zero).__name__}",
            sharded_parameters=f"{sharded} of {len(parameters)}",
            sharding=f"{parts}: {self.world.world_size} shard(s)",
            optimizer=f"{type(self.optimizer).__name__} (fp32 state, ZeRO-{self.stage})",
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """DeepSpeed holds the bf16 copy of the weights itself."""
        return contextlib.nullcontext()

    def forward(self, batch: PackedBatch) -> LossOutput:
        return run_model(self, batch)

    def forward_backward(self, batches: Sequence[PackedBatch]) -> StepSums:
        """DeepSpeed reduces on the last micro-batch; the `step` after it updates."""
        return sum_micro_batches(self, batches, self._micro_batch)

    def _micro_batch(self, batch: PackedBatch, scale: float, last: bool) -> LossOutput:
        output = self.forward(batch)
        self.model.backward(output.loss_sum * scale, scale_wrt_gas=False)
        if not last:
            self.model.step()  # counts the micro-batch; nothing is updated before the last one
        return output

    def clip(self) -> None:
        """Nothing to do: DeepSpeed clips in its step."""

    def step(self, lr: float) -> float:
        """Clip, update, zero (all inside DeepSpeed); returns the gradient norm before clipping."""
        set_rate(self.optimizer, lr)
        self.model.step()
        if self.average is not None and not self.zero.overflow:
            self.average.update()
        return float(self.model.get_global_grad_norm())

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        return swapped(self._exchange)

    def _exchange(self) -> None:
        """Swap the masters with their average, then round the low-precision copies from them as DeepSpeed does."""
        assert self.average is not None
        self.average.exchange()
        for _, parameter in self._named:
            value = self._library.utils.safe_get_full_fp32_param(parameter)
            self._set_copy(parameter, value.detach().reshape(_shape(parameter)))

    def _set_copy(self, parameter: Tensor, value: Tensor | None) -> None:
        """Set the weights that the forward pass uses, not the masters. In stage 3 only rank 0's value counts."""
        zero = self._library.zero
        with zero.GatheredParameters(parameter, modifier_rank=0) if self.stage == 3 else contextlib.nullcontext():
            if value is not None:
                parameter.data.copy_(value)

    def shares(self) -> Iterator[Share]:
        """This rank's elements of the fp32 weights and of the optimizer's state, as ZeRO cut them; no communication."""
        for name, parameter in self._named:
            yield from self._share("model", name, parameter, None)
        yield from self._frozen_shares()
        constants = [("model", name, tensor) for name, tensor in self.decoder.constants()]
        yield from shares_of(constants, self.world.rank, self.world.world_size)
        if any(self.optimizer.state.get(flat) for flat in self._flat_partitions()):
            yield from self._state_shares()
        if self.average is not None:
            with swapped(self.average.exchange):  # into the place of the masters: only DeepSpeed knows how it cuts them
                for name, parameter in self._named:
                    for share in self._share(GROUP, PREFIX + name, parameter, None):
                        yield replace(share, tensor=share.tensor.clone())

    def _frozen_shares(self) -> Iterator[Share]:
        """This rank's part of the frozen weights that a checkpoint keeps: whole ones are divided, ZeRO-3's shards are there."""
        kept = {name for name, _ in kept_parameters(self.decoder)}
        chosen = [(name, parameter) for name, parameter in self._frozen if name in kept]
        if self.stage < 3:
            named = [("model", name, parameter) for name, parameter in chosen]
            yield from shares_of(named, self.world.rank, self.world.world_size)
            return
        for name, parameter in chosen:
            values = parameter.ds_tensor.detach().flatten()  # type: ignore[attr-defined]
            start = self.world.rank * values.numel()
            length = max(0, min(values.numel(), _shape(parameter).numel() - start))
            if length:
                yield Share("model", name, tuple(_shape(parameter)), start, values[:length])

    def _state_shares(self) -> Iterator[Share]:
        self._link_states()
        whole: list[tuple[str, str, Tensor]] = []
        for name, parameter in self._named:
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
        utils = self._library.utils
        values = (
            utils.safe_get_local_fp32_param(parameter) if key is None else utils.safe_get_local_optimizer_state(parameter, key)
        )
        start = self.world.rank * values.numel()
        length = max(0, min(values.numel(), _shape(parameter).numel() - start))
        return (start, values.detach().flatten()[:length]) if length else None

    def load_model(self, source: TensorSource) -> None:
        """Set the fp32 master weights exactly, and the low-precision copies from them; the average starts from them."""
        for name, parameter in self._named:
            if source.shape(name) != tuple(_shape(parameter)):
                raise ConfigError(f"checkpoint: {name} has shape {source.shape(name)}, expected {tuple(_shape(parameter))}")
            self._read_piece(source, name, parameter, None)
            reads = self.stage < 3 or self.world.is_main  # stage 3: the others get their part from rank 0
            self._set_copy(parameter, source.tensor(name) if reads else None)
        for name, parameter in self._frozen:
            if source.shape(name) != tuple(_shape(parameter)):
                raise ConfigError(f"checkpoint: {name} has shape {source.shape(name)}, expected {tuple(_shape(parameter))}")
            self._set_copy(parameter, source.tensor(name) if self.stage < 3 or self.world.is_main else None)
        for name, tensor in self.decoder.constants():
            copy_from(source, name, tensor)
        if self.average is not None:
            self.average.reset()

    def load_average(self, source: TensorSource) -> None:
        """The average is read in the place of the masters, because only DeepSpeed knows how it cuts them."""
        assert self.average is not None
        check_average(source, [name for name, _ in self._named])
        with swapped(self.average.exchange):
            for name, parameter in self._named:
                self._read_piece(source, PREFIX + name, parameter, None)

    def load_optimizer(self, source: TensorSource) -> None:
        """State is made for every flat partition first, then each rank reads its own elements into it."""
        stored = states_by_parameter(source)
        if sorted(stored) != sorted(name for name, _ in self._named):
            raise ConfigError("the checkpoint does not hold the optimizer state of this model: it cannot continue a run")
        known: set[Tensor] = set()
        for name, parameter in self._named:
            wanted = expected_keys(self._groups[id(parameter)] in self._muon_groups)
            if set(stored[name]) != set(wanted):
                raise wrong_state(self.optimizer, name, stored[name], wanted)
            flat = self._flat_of(parameter)
            if flat not in known:
                known.add(flat)
                counts = {key: source.tensor(f"{name}.{key}") for key in wanted if not len(source.shape(f"{name}.{key}"))}
                self._make_state(flat, counts, [key for key in wanted if key not in counts])
        self._link_states()
        for name, parameter in self._named:
            for key in stored[name]:
                if len(source.shape(f"{name}.{key}")):
                    self._read_piece(source, f"{name}.{key}", parameter, key)

    def _make_state(self, flat: Tensor, counts: dict[str, Tensor], moments: list[str]) -> None:
        """Give a flat partition its state: these counts, and empty moments to read into, on disk where they are offloaded."""
        group = next(i for i, held in enumerate(self._flat_partitions()) if held is flat)
        on_disk = self.stage == 3 and self.zero._swappable_optimizer_subgroup(group)
        if on_disk:
            self.zero._optimizer_states_and_gradient_swap_in(group)
        if not (on_disk and self.optimizer.state[flat]):  # the swapper knows what is swapped already by its tensors
            self.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in moments}
        self.optimizer.state[flat] |= {key: value.to(flat.device).clone() for key, value in counts.items()}
        if on_disk:
            self.zero._optimizer_states_and_gradient_swap_out(group)

    def _read_piece(self, source: TensorSource, name: str, parameter: Tensor, key: str | None) -> None:
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
            self._library.utils.safe_set_local_fp32_param(parameter, values)
        else:
            self._library.utils.safe_set_local_optimizer_state(parameter, values, key)

    def discard(self) -> None:
        """DeepSpeed throws gradients away on an overflow, so it is told that there was one."""
        hook = "check_overflow" if self.stage < 3 else "_overflow_check_and_loss_scale_update"

        def overflow(*args: Any, **options: Any) -> bool:
            self.zero.overflow = True
            return True

        if self.stage < 3:
            self.zero.check_grad_overflow = True
        setattr(self.zero, hook, overflow)
        try:
            self.model.step()
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
        """The matrices of each of Muon's flat partitions: the ranks tell each other which elements they hold. Collective."""
        chosen = [p for _, p in self._named if self._groups[id(p)] in self._muon_groups]
        pieces = [self._local_piece(parameter, None) for parameter in chosen]
        runs = self.world.gather([(start, values.numel()) for start, values in (piece or (0, _NOTHING) for piece in pieces)])
        found: dict[int, list[SlicedMatrix]] = {}
        for i, parameter in enumerate(chosen):
            flat, shape = self._flat_of(parameter), _shape(parameter)
            matrix = slices_of((shape[0], shape[1]), self._place_of(parameter)[1], [held[i] for held in runs])
            found.setdefault(id(flat), []).append(matrix)
        return found

    def _link_states(self) -> None:
        """Let DeepSpeed find each parameter's moments: it links them once, before AdamW has made them."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()


def _shape(parameter: Tensor) -> torch.Size:
    """Full shape of a parameter, also where ZeRO-3 keeps a shard only."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
