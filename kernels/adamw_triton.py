"""Triton engine of the AdamW step: contract and maths in adamw.py.

Both kernels run over all tensors in one launch: a program takes BLOCK elements of one tensor, which a table of blocks names,
and finds its memory in a table of addresses. Offsets are 64-bit. The norm's partial sums are added in a fixed order.

Proof:  TRITON_INTERPRET=1 pytest tests/kernels/test_adamw.py
        python -m chatmill.kernels.cross_compile chatmill.kernels.adamw_triton
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chatmill.kernels.cross_compile import Case
from chatmill.kernels.dispatch import on_its_device
from chatmill.kernels.interpreter import install, is_interpreting

BLOCK = 1024


@triton.jit
def _at(TABLE, tensor, kind: tl.constexpr, n_tensors, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements of a tensor, from its address."""
    pointers = tl.load(TABLE + kind * n_tensors + tensor).to(tl.pointer_type(DTYPE)) + offsets
    return tl.multiple_of(pointers, 16) if ALIGNED else pointers  # lets the compiler move 16 bytes at a time


@triton.jit
def _sum_squares(TABLE, PARTIAL, block, tensor, at, mask, n_tensors, ALIGNED: tl.constexpr):
    g = tl.load(_at(TABLE, tensor, 0, n_tensors, at, tl.float32, ALIGNED), mask=mask, other=0.0)
    tl.store(PARTIAL + block, tl.sum(g * g, 0))


@triton.jit
def squares_kernel(TABLE, TENSOR, START, SIZES, PARTIAL, n_tensors, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """PARTIAL (blocks,) = sum of squares of each block."""
    block = tl.program_id(0)
    tensor = tl.load(TENSOR + block)
    size, at = tl.load(SIZES + tensor), tl.load(START + block) * BLOCK + tl.arange(0, BLOCK)
    if (tl.load(START + block) + 1) * BLOCK <= size:  # a mask that the compiler cannot see through reads 4 bytes at a time
        _sum_squares(TABLE, PARTIAL, block, tensor, at, tl.full([BLOCK], True, tl.int1), n_tensors, ALIGNED)
    else:
        _sum_squares(TABLE, PARTIAL, block, tensor, at, at < size, n_tensors, ALIGNED)


@triton.jit
def _update(TABLE, tensor, at, mask, n_tensors, SCALARS, decay, beta1, beta2, eps, COPY: tl.constexpr, ALIGNED: tl.constexpr):
    w_at = _at(TABLE, tensor, 0, n_tensors, at, tl.float32, ALIGNED)
    w = tl.load(w_at, mask=mask, other=0.0)
    if tl.load(SCALARS + 1) != 0.0:
        m_at = _at(TABLE, tensor, 2, n_tensors, at, tl.float32, ALIGNED)
        v_at = _at(TABLE, tensor, 3, n_tensors, at, tl.float32, ALIGNED)
        g = tl.load(_at(TABLE, tensor, 1, n_tensors, at, tl.float32, ALIGNED), mask=mask, other=0.0) * tl.load(SCALARS)
        m = tl.load(m_at, mask=mask, other=0.0)
        v = tl.load(v_at, mask=mask, other=0.0)
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        w *= 1 - decay
        w -= tl.load(SCALARS + 2) * m / (tl.sqrt(v) * tl.load(SCALARS + 3) + eps)
        tl.store(m_at, m, mask=mask)
        tl.store(v_at, v, mask=mask)
        tl.store(w_at, w, mask=mask)
    if COPY:
        tl.store(_at(TABLE, tensor, 4, n_tensors, at, tl.bfloat16, ALIGNED), w.to(tl.bfloat16), mask=mask)


@triton.jit
def adamw_kernel(
    TABLE,
    TENSOR,
    START,
    SIZES,
    DECAYS,
    SCALARS,
    n_tensors,
    beta1,
    beta2,
    eps,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update of adamw.py; SCALARS: clip factor, whether to update, lr / correction 1, 1 / sqrt(correction 2)."""
    block = tl.program_id(0)
    tensor = tl.load(TENSOR + block)
    size, at = tl.load(SIZES + tensor), tl.load(START + block) * BLOCK + tl.arange(0, BLOCK)
    decay = tl.load(DECAYS + tensor)
    if (tl.load(START + block) + 1) * BLOCK <= size:
        full = tl.full([BLOCK], True, tl.int1)
        _update(TABLE, tensor, at, full, n_tensors, SCALARS, decay, beta1, beta2, eps, COPY, ALIGNED)
    else:
        _update(TABLE, tensor, at, at < size, n_tensors, SCALARS, decay, beta1, beta2, eps, COPY, ALIGNED)


@on_its_device
def update(
    tensors: Sequence[Sequence[Tensor]],
    scalars: Tensor,
    decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    copy: bool,
) -> None:
    """Launch adamw_kernel over (weights, gradients, means, squares, copies)."""
    weights = tensors[0]
    which, start, sizes = _blocks(tuple(w.numel() for w in weights), scalars.device)
    if which.numel():
        adamw_kernel[(which.numel(),)](
            _addresses(tensors),
            which,
            start,
            sizes,
            _upload(torch.tensor(decays, dtype=torch.float32), scalars.device),
            scalars,
            len(weights),
            *betas,
            eps,
            COPY=copy,
            ALIGNED=_is_aligned(tensors),
            BLOCK=BLOCK,
        )


@on_its_device
def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Sum of all squares, Float32[""]."""
    device = gradients[0].device
    which, start, sizes = _blocks(tuple(g.numel() for g in gradients), device)
    partial = torch.empty(which.numel(), device=device)
    if which.numel():
        squares_kernel[(which.numel(),)](
            _addresses([gradients]), which, start, sizes, partial, len(gradients), ALIGNED=_is_aligned([gradients]), BLOCK=BLOCK
        )
    return partial.double().sum().float()


def _addresses(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Int64["kinds tensors"]; made anew for each step, because gradients move."""
    if is_interpreting():
        install()
    return _upload(torch.tensor([[t.data_ptr() for t in kind] for kind in tensors], dtype=torch.int64), tensors[0][0].device)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; from page-locked memory, so that the host does not wait."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.lru_cache(maxsize=8)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(tensor of each block Int32, its number inside the tensor Int64, sizes Int64) for tensors of so many elements."""
    counts = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes], dtype=torch.int64)
    which = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    inside = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    return which.int().to(device), inside.to(device), torch.tensor(sizes, dtype=torch.int64).to(device)


def _is_aligned(tensors: Sequence[Sequence[Tensor]]) -> bool:
    return all(t.data_ptr() % 16 == 0 for kind in tensors for t in kind)


def shipped_cases() -> list[Case]:
    """The configurations that ship, for the cross-compilation gates."""
    tables = {"TABLE": "*i64", "TENSOR": "*i32", "START": "*i64", "SIZES": "*i64", "n_tensors": "i32"}
    update_types = tables | {"DECAYS": "*fp32", "SCALARS": "*fp32"} | dict.fromkeys(("beta1", "beta2", "eps"), "fp32")
    cases = []
    for arch, aligned in ((80, True), (90, True), (100, True), (90, False)):
        shape = {"ALIGNED": aligned, "BLOCK": BLOCK}
        kind = "" if aligned else " unaligned"
        norm = tables | {"PARTIAL": "*fp32"}
        cases.append(Case(f"squares{kind}", squares_kernel, norm, shape, arch=arch, tensor_cores=False))
        for copy in (False, True):
            name, budget = f"adamw{' with bf16 copy' if copy else ''}{kind}", 16 if copy else 0  # two words, on sm_100
            constants = shape | {"COPY": copy}
            case = Case(name, adamw_kernel, update_types, constants, arch=arch, tensor_cores=False, spill_bytes=budget)
            cases.append(case)
    return cases
