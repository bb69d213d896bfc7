"""The linear cross-entropy with torch's matrix products (cuBLAS on a GPU) around the Triton kernels of a row's statistics.

    logits chunk = x @ W.T in x's dtype        statistics and gradient in place: triton_tier.py
    d_weight    += G.T @ x                     in fp32, by addmm with out_dtype where torch has it, else by vocabulary slices

The other form of triton_tier.py's products, chosen by LossOptions.products. Two differences to know: the loss of a training
step is taken from logits rounded to x's dtype, as PyTorch's own is (the Triton form takes it from the fp32 accumulators), and
they are read once more. The loss alone needs no stored logits: fp32 products of vocabulary slices, at most SLICE_BYTES each.
Extra memory of a step is that of the Triton form: one chunk of logits and the head's fp32 sums, of which the bf16 result, not
yet made, would be half.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/cross_entropy -k "products or by_torch"
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..tensors import wide_dtype
from .row_statistics import new_statistics, statistics, statistics_block
from .rows import LossOptions, Statistics
from .torch_tier import accumulate

# fp32 logits of one vocabulary slice, where only the loss is wanted
SLICE_BYTES = 256 << 20


def project_by_torch(x: Tensor, weight: Tensor, labels: Tensor, logits: Tensor | None, options: LossOptions) -> Statistics:
    """triton_tier.project: raw logits (R, >= V), or None, and the statistics. What lies beyond V is not written."""
    vocabulary = weight.shape[0]
    if logits is not None:
        torch.mm(x, weight.T, out=logits[:, :vocabulary])
        return statistics(logits, labels, options, vocabulary)
    block = statistics_block(vocabulary)
    n_tiles = -(-vocabulary // block)
    whole = new_statistics(x, n_tiles, x.shape[0], options)
    tiles = max(1, SLICE_BYTES // (x.shape[0] * block * whole.own.element_size()))
    for tile in range(0, n_tiles, tiles):
        first, last = tile * block, min((tile + tiles) * block, vocabulary)
        here = torch.where((labels >= first) & (labels < last), labels - first, -1)
        statistics(wide_product(x, weight[first:last].T), here, options, into=whole.of_tiles(tile, tile + tiles))
    return whole


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 (fp64 for fp64), not rounded in between."""
    wide = wide_dtype(a.dtype)
    if a.dtype is wide:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda else torch.mm(a.to(wide), b.to(wide))


def accumulate_by_torch(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """total (V, H) fp32 += gradient (R, V).T @ x (R, H)."""
    if gradient.dtype is not total.dtype and gradient.is_cuda and adds_wide(gradient.device, gradient.dtype):
        torch.addmm(total, gradient.T, x, out_dtype=total.dtype, out=total)
    else:
        accumulate(total, gradient, x)


@functools.lru_cache(maxsize=16)
def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a narrow product to an fp32 matrix in place; 2.8 and 2.9 do not (pytorch pull request 167931)."""
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
