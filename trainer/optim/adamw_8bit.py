"""AdamW with moments of one byte each, through torchao; needs the extra `optim8bit`.

A moment is stored as codes (uint8, shaped as the parameter) and one fp32 scale per block of consecutive elements. torchao
cuts blocks of 256 wherever a SHARD's size allows, so its layout depends on the world size. Here a block divides the rows of the
parameter: the layout is the same however rows are sharded, and a checkpoint is restored bit for bit at any world size.
Parameters with fewer than 4096 elements, or rows that no block divides, keep fp32 moments.

torchao compiles its step with inductor, once per parameter shape (about ten seconds on a CPU, with a C++ compiler). That pays
only on a GPU, where one fused kernel reads and writes each byte once. On a CPU the same function runs uncompiled.
Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861; torchao.optim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit as _TorchAOAdamW8bit
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

from ..checkpoint.sharding import distribute_rows, local_of, shard_like

BLOCKS = (256, 128, 64, 32)
SMALLEST = 4096  # elements; smaller parameters keep fp32 moments, as in torchao and bitsandbytes
MOMENTS = ("exp_avg", "exp_avg_sq")


def block_size(shape: tuple[int, ...]) -> int | None:
    """Elements that share a scale, or None if a parameter of this (full) shape keeps fp32 moments."""
    if len(shape) != 2 or shape[0] * shape[1] < SMALLEST:
        return None
    return next((block for block in BLOCKS if shape[1] % block == 0), None)


class AdamW8bit(_TorchAOAdamW8bit):
    """torchao's AdamW8bit on local shards, with blocks that do not depend on the world size."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        on_gpu = any(p.device.type == "cuda" for group in groups for p in group["params"])
        self._update = torch.compile(single_param_adam, fullgraph=True, dynamic=False) if on_gpu else single_param_adam

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient; nothing is communicated."""
        assert closure is None
        with torch._dynamo.utils.disable_cache_limit():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    local = local_of(parameter.detach())
                    state = self.state[parameter]
                    if not state:
                        state |= {"step": torch.tensor(0.0), **self._zeros(parameter)}
                    state["step"] += 1
                    if not local.numel():
                        continue
                    self._update(
                        local,
                        local_of(parameter.grad),
                        state["step"],
                        state["exp_avg"],
                        state["exp_avg_sq"],
                        None,
                        group["lr"],
                        *group["betas"],
                        group["weight_decay"],
                        group["eps"],
                        True,
                        False,
                    )

    def _zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        local, block = local_of(parameter), block_size(tuple(parameter.shape))
        if block is None or not local.numel():
            return {key: torch.zeros_like(local) for key in MOMENTS}
        return {
            key: OptimState8bit.zeros(local.shape, key == "exp_avg", block, local.device, dtype=local.dtype) for key in MOMENTS
        }

    def split_state(self, parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State for a checkpoint: NAME_codes Uint8 and NAME_scale Float32 ["rows blocks"], or NAME in fp32; sharded alike."""
        if not state:
            return {}
        rows = local_of(parameter).shape[0]
        out = {"step": state["step"]}
        block = block_size(tuple(parameter.shape))
        for key in MOMENTS:
            moment = state[key]
            if block is None:
                out[key] = _as_shard(moment, parameter, tuple(parameter.shape))
                continue
            codes, scale = (
                (moment.codes, moment.scale)
                if isinstance(moment, OptimState8bit)
                else (moment.to(torch.uint8), moment.new_empty(0))  # a rank without rows
            )
            blocks = parameter.shape[1] // block
            out[f"{key}_codes"] = _as_shard(codes, parameter, tuple(parameter.shape))
            out[f"{key}_scale"] = _as_shard(scale.view(rows, blocks), parameter, (parameter.shape[0], blocks))
        return out

    def join_state(self, parameter: Tensor, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State from a checkpoint's full tensors: those of split_state, or AdamW's fp32 moments, which are quantised."""
        state = {"step": entries["step"].cpu(), **self._zeros(parameter)}
        for key in MOMENTS:
            moment = state[key]
            if not isinstance(moment, OptimState8bit):
                if moment.numel():
                    moment.copy_(local_of(shard_like(entries[key], parameter)))
            elif key in entries:
                moment.copy_(local_of(shard_like(entries[key], parameter)))
            else:
                device = parameter.device
                moment.codes.copy_(local_of(distribute_rows(entries[f"{key}_codes"].to(device), parameter)))
                moment.scale.copy_(local_of(distribute_rows(entries[f"{key}_scale"].to(device), parameter)).reshape(-1))
        return state


def _as_shard(local: Tensor, parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A local shard as a DTensor of the given full shape, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
