"""Bytes that one training step keeps alive, found by running the real model on fake tensors, without weights or a GPU.

    trace = trace_step(config, tokens=8192, rows=8192, precision="bf16", device="gpu")
    trace.activations + trace.workspace      # the most bytes alive besides weights, gradients and optimizer

A dispatch mode sees every tensor that forward, loss and backward make and follows it until it is freed. So what autograd saves,
what activation checkpointing avoids and what autocast copies is what the code really does. The inside of a custom operator (a
kernel) is invisible: its scratch memory is added by formula, which only the loss needs.
Checked against measured peaks: tests/trainer/plan/test_plan.py (CPU), tests/gpu_check.py (GPU).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ...kernels.cross_entropy.tiles import chunk_rows, logits_bytes
from ...kernels.cross_entropy.torch_tier import CHUNK_BYTES, PRODUCT_BYTES
from ...kernels.dispatch import planning_for_gpu
from ..adapters.prepare import prepare
from ..adapters.quantised import only_shapes
from ..backends.choose import build_model, traceable
from ..config import KernelSection, ModelConfig, Recipe
from ..foreign_config import ForeignConfig

SHALLOW = 2  # layers of the models that are traced instead of deep ones
ON_GPU = KernelSection(attention="triton", cross_entropy="triton", elementwise="triton")


@dataclass(frozen=True)
class Trace:
    """The most bytes alive at once in a step besides weights, their gradients and the optimizer.

    activations: what operators made and something still holds; workspace: scratch of the loss kernel, if it ran at that moment.
    last: the most alive while the gradients of the first layer are made, when those of all other layers exist already.
    """

    activations: int
    workspace: int
    last: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.workspace


class LiveBytes(TorchDispatchMode):
    """Follows every storage that operators make until it is freed; `leave_out` is for gradients of parameters."""

    def __init__(self, workspace: Callable[[Any, tuple[Any, ...]], int]) -> None:
        super().__init__()
        self._workspace = workspace
        self._sizes: dict[int, int] = {}
        self.alive = 0
        self.peak = Trace(0, 0)
        self._since: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, Tensor):
                self._follow(value)
        self._look(self._workspace(func, args))
        return out

    def begin_last(self) -> None:
        """What is alive from here on counts for `last`; the latest call applies."""
        self._since = self.alive

    def trace(self) -> Trace:
        """The largest moments so far."""
        return replace(self.peak, last=self._since or 0)

    def leave_out(self, tensor: Tensor) -> None:
        """Stop counting the tensor's storage."""
        key = self._follow(tensor)
        self.alive -= self._sizes[key]
        self._sizes[key] = 0

    def known(self, tensor: Tensor) -> None:
        """A tensor that was there before the step."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def _follow(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.alive += self._sizes[key]
            weakref.finalize(storage, self._forget, key).atexit = False
        return key

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    def _look(self, workspace: int) -> None:
        if self.alive + workspace > self.peak.total:
            self.peak = Trace(self.alive, workspace)
        if self._since is not None:
            self._since = max(self._since, self.alive + workspace)


def estimate_step(config: ModelConfig, **options: Any) -> Trace:
    """trace_step of a model of any depth, from two shallow ones: all layers are alike, so every figure is linear in depth."""
    # the layers of a model of transformers need not be alike: the first ones of DeepSeek-V3 are dense
    if isinstance(config, ForeignConfig) or config.layers <= 2 * SHALLOW or _names_layers(options.get("recipe")):
        return trace_step(config, **options)
    low, high = (trace_step(_with_layers(config, layers), **options) for layers in (SHALLOW, 2 * SHALLOW))
    more = (config.layers - 2 * SHALLOW) / SHALLOW
    workspace = high.workspace if low.workspace else 0
    last = round(high.last + more * (high.last - low.last))
    return Trace(round(high.total + more * (high.total - low.total)) - workspace, workspace, last)


def _names_layers(recipe: Recipe | None) -> bool:
    """Whether layers differ in what is trained: then a shallow model is not like the deep one."""
    adapter = None if recipe is None else recipe.adapter
    patterns = () if recipe is None else recipe.train.freeze
    return any("layers." in pattern for pattern in (*patterns, *((*adapter.targets, *adapter.train) if adapter else ())))


def _with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    return ModelConfig.model_validate({name: getattr(config, name) for name in ModelConfig.model_fields} | {"layers": layers})


def trace_step(
    config: ModelConfig,
    *,
    tokens: int,
    rows: int,
    precision: Literal["bf16", "fp32"],
    device: Literal["cpu", "gpu"] = "gpu",
    checkpointing: bool | Literal["full", "selective"] = False,
    low_precision_weights: bool = False,
    recipe: Recipe | None = None,
) -> Trace:
    """Run forward, loss and backward of one micro-batch without computing anything.

    tokens: T of a micro-batch; rows: of those, how many carry loss. device: whose kernels are meant.
    low_precision_weights: the engine hands the model bf16 weights (FSDP2, ZeRO) instead of casting fp32 ones by autocast.
    recipe: its adapter and what it freezes.
    """
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = compute if low_precision_weights else torch.float32
    chosen = ON_GPU if device == "gpu" else KernelSection()
    planning = planning_for_gpu() if device == "gpu" else contextlib.nullcontext()
    casting = precision == "bf16" and not low_precision_weights
    with FakeTensorMode(allow_non_fake_inputs=True), planning, only_shapes(), traceable(config):
        before = torch.get_default_dtype()
        torch.set_default_dtype(weights)  # a fake parameter cannot be cast later
        try:
            model = build_model(config, chosen)
            if recipe is not None:
                prepare(model, recipe)
        finally:
            torch.set_default_dtype(before)
        model.set_recompute(checkpointing)
        follower = LiveBytes(lambda func, args: _loss_workspace(func, args, device))
        batch = {
            "tokens": torch.zeros(tokens, dtype=torch.int32),
            "positions": torch.zeros(tokens, dtype=torch.int32),
            "targets": torch.zeros(tokens, dtype=torch.int64),
            "rows": torch.zeros(rows, dtype=torch.int32),
            "cu_seqlens": torch.zeros(2, dtype=torch.int32),
        }
        for parameter in model.parameters():
            follower.known(parameter)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: follower.leave_out(p.grad))
        for parameter in (p for p in model.layers[1].parameters() if p.requires_grad) if config.layers > 1 else ():
            parameter.register_post_accumulate_grad_hook(lambda p: follower.begin_last())
        for tensor in batch.values():
            follower.known(tensor)
        with follower:
            with torch.autocast("cpu", dtype=torch.bfloat16) if casting else contextlib.nullcontext():
                output = model(**batch, max_seqlen=tokens)
            (output.loss_sum * 0.5).backward()
    return follower.trace()


def _loss_workspace(func: Any, args: tuple[Any, ...], device: str) -> int:
    """Scratch bytes of the fused head and loss beyond its outputs: a cast weight, one chunk of logits, wider sums."""
    if func is not torch.ops.chatmill.linear_cross_entropy_sum.default:
        return 0
    x, weight = args[0], args[1]
    (n_rows, hidden), vocabulary = x.shape, weight.shape[0]
    head = vocabulary * hidden
    cast = head * x.element_size() if x.dtype != weight.dtype else 0
    if device == "gpu":
        many = chunk_rows(n_rows, vocabulary, x.element_size()) < n_rows
        # of sums wider than the result, the other half
        halves = head * 2 if many and weight.element_size() < 4 else 0
        return cast + halves + logits_bytes(n_rows, vocabulary, x.element_size())
    size = max(1, min(n_rows, CHUNK_BYTES // (vocabulary * 4)))
    if x.element_size() == 4:
        return cast + size * vocabulary * 4
    chunk = size * vocabulary * 6 + min(head * 2, PRODUCT_BYTES // 2)  # a bf16 copy of the logits, a slice of a bf16 product
    return cast + (max(head * 4, head * 2 + chunk) if weight.element_size() < 4 else chunk)
