"""Tiles and chunk sizes of the linear cross-entropy in Triton: one shipped table, nothing measured at run time.

    row_for(90, 2)   ->  tiles of both products and the bytes that one chunk of logits may take, for bf16 on Hopper

tuning/linear_cross_entropy.json is fixed, so every rank of a job computes alike; `chatmill bench kernels
linear_cross_entropy --tune` refits it on a GPU (tune, below). Extra memory of a step, at V=128256 and H=2048 in bf16:

    lower halves of d_weight's fp32 sums 2 V H = 525 MB  +  logits_bytes 600 MB  +  gathered rows, normed rows 4 R H

which is 1.26 GB at R=16384 rows (test_linear_cross_entropy_memory.py). A smaller chunk costs time: each chunk
reads and writes all of d_weight's sums, 8 bytes per element, against 2 x rows FLOPs. On an H200 (750 TFLOP/s, 4.3 TB/s) the
two take equally long at 700 rows; at 2304 rows the traffic is 10 % of the three products, at 4096 rows 6 % (by arithmetic,
not timed), unless it is hidden behind them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import capability

TABLE = Path(__file__).resolve().parents[1] / "tuning" / "linear_cross_entropy.json"
CHUNK_ROWS = 8192  # more make no product faster
BUDGETS = (150_000_000, 300_000_000, 450_000_000, 600_000_000)  # --tune never takes more memory than is promised
CANDIDATES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (256, 128, 64, 8, 3))


class Tile(NamedTuple):
    """Blocks of one product: rows x columns of the result, depth of a step; warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TuningRow:
    """One line of the table: for these architectures and bytes per element (4: everything wider than 16 bits).

    logits_bytes: budget of one chunk's logits. products: who multiplies, "triton" or "torch" (torch_products.py).
    timed: date and GPU of the measurement behind it, or None.
    """

    arch: tuple[int, int]
    bytes: int
    project: Tile
    accumulate: Tile
    logits_bytes: int
    products: str
    timed: str | None


def _read() -> list[TuningRow]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    tiles = ({"arch": tuple(r["arch"]), "project": Tile(*r["project"]), "accumulate": Tile(*r["accumulate"])} for r in rows)
    return [TuningRow(**(row | made)) for row, made in zip(rows, tiles, strict=True)]


ROWS = _read()  # at import: Dynamo cannot trace reading a file
# rows that are not 16-byte aligned are read element by element, which takes the registers of the larger tiles
UNALIGNED = (Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3))
INTERPRETED = (Tile(32, 64, 32, 4, 1), Tile(32, 64, 32, 4, 1))


def row_for(arch: int, element_bytes: int) -> TuningRow:
    """The table's line for a compute capability (Hopper's without a GPU)."""
    arch, kind = min(max(arch or 90, 80), 129), 2 if element_bytes == 2 else 4
    return next(row for row in ROWS if row.arch[0] <= arch <= row.arch[1] and row.bytes == kind)


def products(asked: str, x: Tensor) -> str:
    """Who multiplies: what was asked for, or what the table says for x's device and dtype."""
    return row_for(capability(x.device), x.element_size()).products if asked == "auto" else asked


def tiles(*matrices: Tensor) -> tuple[Tile, Tile]:
    """(projection, accumulation) for the device, dtype and alignment of the operands."""
    first = matrices[0]
    if not first.is_cuda:
        return INTERPRETED
    if not all(is_aligned(m) for m in matrices):
        return UNALIGNED
    row = row_for(capability(first.device), first.element_size())
    return row.project, row.accumulate


def chunk_rows(n_rows: int, vocabulary: int, element_bytes: int, arch: int = 90) -> int:
    """Rows of one chunk of logits: as few chunks as the budget allows, all of (nearly) one size.

    A multiple of 128 between 128 and CHUNK_ROWS; at least 1, at most n_rows.
    """
    budget = row_for(arch, element_bytes).logits_bytes
    fit = budget // (_padded(vocabulary) * element_bytes) // 128 * 128
    fit = min(CHUNK_ROWS, max(128, fit))
    chunks = max(1, -(-n_rows // fit))
    return max(1, min(n_rows, -(-n_rows // (chunks * 128)) * 128))


def logits_buffer(n_rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """Uninitialised (rows, >= V) whose row stride is a multiple of 128 elements, so any vocabulary has aligned rows."""
    return like.new_empty((n_rows, _padded(vocabulary)))


def logits_bytes(n_rows: int, vocabulary: int, element_bytes: int, arch: int = 90) -> int:
    """Bytes of the logits that a step over n_rows holds at once."""
    return chunk_rows(n_rows, vocabulary, element_bytes, arch) * _padded(vocabulary) * element_bytes


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // 128) * 128


def is_aligned(matrix: Tensor) -> bool:
    """Whether every row starts on a 16-byte boundary."""
    return matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def has_descriptors(*matrices: Tensor) -> bool:
    """Whether these matrices can be read by the tensor memory accelerator (sm_90 and later; 16-byte rows)."""
    old = matrices[0].is_cuda and capability(matrices[0].device) < 90
    return not old and all(m.element_size() == 2 and m.numel() > 0 and is_aligned(m) for m in matrices)


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: as torch.set_float32_matmul_precision says (default: exactly)."""
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def tune(measure: Callable[[], float], arch: int, budget_s: float, gpu: str, table: Path = TABLE) -> TuningRow:
    """Refit the 16-bit row of `arch`: tiles of one product, then of the other, then the chunk; the table is written after each.

    measure: milliseconds of a step with gradients; infinite where a build fails. Of chunks within 1 % of the fastest the
    smallest is kept: it leaves memory to others.
    """
    at = ROWS.index(row_for(arch, 2))
    shipped, started, best = ROWS[at], time.monotonic(), measure()

    def trial(**change: Any) -> float:
        kept, ROWS[at] = ROWS[at], replace(ROWS[at], **change)
        took = measure()
        print(f"{change}: {took:.3f} ms (best {best:.3f})", flush=True)
        ROWS[at] = kept
        return took

    def keep(**change: Any) -> None:
        ROWS[at] = replace(ROWS[at], timed=f"{time.strftime('%Y-%m-%d')} {gpu}", **change)
        table.write_text("[\n" + ",\n".join("  " + json.dumps(asdict(row)) for row in ROWS) + "\n]\n", encoding="utf-8")

    for product in ("project", "accumulate"):
        for candidate in CANDIDATES:
            if time.monotonic() - started > budget_s:
                print(f"stopped after {budget_s:.0f} s; what was found so far is written")
                return ROWS[at]
            if (took := trial(**{product: Tile(*candidate)})) < best * 0.99:
                best = took
                keep(**{product: Tile(*candidate)})
    for other in ("triton", "torch"):  # the shipped tiles stay in the table: the form that lost may be asked for
        if other != ROWS[at].products and (took := trial(products=other)) < best * 0.99:
            best = took
            keep(products=other)
    took_by = {budget: trial(logits_bytes=budget) for budget in BUDGETS}
    fastest = min(took_by.values())
    keep(logits_bytes=next((b for b in BUDGETS if took_by[b] <= fastest * 1.01), shipped.logits_bytes))
    return ROWS[at]
