"""Tile plans of the attention kernels, made on the CPU beside each batch: no layer waits for the GPU to see cu_seqlens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.attention.device_plan import DevicePlan, plan_attention
from ..model_config import ModelConfig


class AttentionPlans(dict[int | None, DevicePlan]):
    """One tile plan per sliding window that the model's layers use; moves to the device with its batch."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionPlans:
        """Copies on `device`."""
        return AttentionPlans({window: plan.to(device, non_blocking) for window, plan in self.items()})

    def pin_memory(self) -> AttentionPlans:
        """Copies in page-locked memory."""
        return AttentionPlans({window: plan.pin_memory() for window, plan in self.items()})


def plan_maker(
    config: ModelConfig, impl: str, precision: str, device: torch.device
) -> Callable[[NDArray[np.int32], int], AttentionPlans] | None:
    """What PackedStream's `annotate` wants for this model; None where no kernel would use plans (on a CPU).

    impl: kernels.attention of the recipe. precision: bf16 or fp32, in which attention runs.
    """
    if device.type != "cuda" or impl not in ("auto", "triton", "hopper"):
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    windows = {config.window_of(layer) for layer in range(config.layers)}

    def plans(cu_seqlens: NDArray[np.int32], length: int) -> AttentionPlans:
        def plan(window: int | None) -> DevicePlan:
            return plan_attention(
                cu_seqlens, length, head_dim=config.d_head, dtype=dtype, window=window, device=device, impl=impl
            )

        return AttentionPlans({window: plan(window) for window in windows})

    return plans
