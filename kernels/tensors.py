"""What every kernel asks of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which sums and statistics are computed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def with_adjacent_columns(x: Tensor) -> Tensor:
    """x, or a contiguous copy where the last axis is strided; all other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(n: int, size: int) -> int:
    """Blocks of that size that hold n. triton.cdiv does the same, and 2 us more so that kernels may call it."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()
