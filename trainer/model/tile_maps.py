"""Tile maps of the attention kernels, made on the CPU beside each batch: no layer waits for the GPU to see cu_seqlens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.attention.tile_map import TileMap, make_tile_map
from ..model_config import ModelConfig


class TileMaps(dict[int | None, TileMap]):
    """One tile map per sliding window that the model's layers use; moves to the device with its batch."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TileMaps:
        """Copies on `device`."""
        return TileMaps({window: tile_map.to(device, non_blocking) for window, tile_map in self.items()})

    def pin_memory(self) -> TileMaps:
        """Copies in page-locked memory."""
        return TileMaps({window: tile_map.pin_memory() for window, tile_map in self.items()})


def tile_map_maker(
    config: ModelConfig, impl: str, precision: str, device: torch.device
) -> Callable[[NDArray[np.int32], int], TileMaps] | None:
    """What PackedStream's `annotate` wants for this model; None where no kernel would use tile maps (on a CPU).

    impl: kernels.attention of the recipe. precision: bf16 or fp32, in which attention runs.
    """
    if device.type != "cuda" or impl not in ("auto", "triton", "hopper"):
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    windows = {config.window_of(layer) for layer in range(config.layers)}

    make = partial(make_tile_map, head_dim=config.d_head, dtype=dtype, device=device, impl=impl)
    return lambda cu_seqlens, length: TileMaps({window: make(cu_seqlens, length, window=window) for window in windows})
