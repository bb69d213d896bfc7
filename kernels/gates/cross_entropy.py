"""Configurations of the linear cross-entropy that ship, for the cross-compilation gates.

python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.cross_entropy
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..cross_entropy.row_statistics import BLOCK, cross_entropy_statistics_kernel
from ..cross_entropy.tiles import ROWS, UNALIGNED, Tile
from ..cross_entropy.triton_tier import (
    cross_entropy_gradient_kernel,
    cross_entropy_project_kernel,
)
from ..cross_entropy.weight_gradient import cross_entropy_accumulate_kernel
from .cross_compile import WHOLE_VECTORS, BuildCase, build_case


def shipped_cases() -> Iterator[BuildCase]:
    """Every tile of the tables as it is launched on a GPU."""
    for row in ROWS:
        arch, narrow = row.arch[0], row.bytes == 2
        yield from _product_cases(arch, narrow, (row.project, row.accumulate), arch >= 90, True)
    yield from _product_cases(90, True, UNALIGNED, False, False)
    for softcap in (0.0, 30.0):
        constants = {"SOFTCAP": softcap, "SMOOTHING": softcap > 0, "BLOCK": BLOCK}
        strides: tuple[str, ...] = ("n_columns", "logits_stride", "out_stride")
        name = f"gradient softcap {softcap:g}"
        yield build_case(name, cross_entropy_gradient_kernel, constants, num_warps=8, aligned=strides, **WHOLE_VECTORS)
    constants = {"SOFTCAP": 30.0, "NEEDS_TOTAL": True, "BLOCK": BLOCK}
    strides = ("n_columns", "logits_stride")
    gates = WHOLE_VECTORS | {"instructions": WHOLE_VECTORS["instructions"][:1]}  # it stores next to nothing
    yield build_case("statistics", cross_entropy_statistics_kernel, constants, num_warps=8, aligned=strides, **gates)


def _product_cases(arch: int, narrow: bool, pair: tuple[Tile, Tile], described: bool, aligned: bool) -> Iterator[BuildCase]:
    dtype = "bf16" if narrow else "fp32"
    kind = f"{dtype} {'descriptors' if described else 'aligned' if aligned else 'unaligned'}"
    shared: dict[str, Any] = {"element": dtype, "arch": arch, "tensor_cores": narrow}

    def operand(rows: int, columns: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {columns}]>" if described else f"*{dtype}"

    fixed = {"DESCRIPTORS": described, "PRECISION": "ieee"}
    t = pair[0]
    types = {"X": operand(t.rows, t.depth), "W": operand(t.columns, t.depth)}
    strides = ("width", "x_stride", "w_stride") if aligned else ()
    for name, softcap, total, store in (("train", 0.0, False, True), ("capped", 30.0, True, True), ("loss", 0.0, False, False)):
        options = {"SOFTCAP": softcap, "NEEDS_TOTAL": total, "STORE": store}
        yield build_case(
            f"project {name} {kind}",
            cross_entropy_project_kernel,
            {**options, **fixed, "BLOCK_R": t.rows, "BLOCK_V": t.columns, "BLOCK_H": t.depth},
            types=types,
            num_warps=t.warps,
            num_stages=t.stages,
            aligned=(*strides, "logits_stride", "n_stored"),
            instructions=("STG.E.128",) if store and aligned and narrow else (),
            forbidden=("STG.E.U16",) if aligned else (),
            **shared,
        )
    t = pair[1]
    parts = {
        "whole": (False, False, False),
        "first": (True, True, False),
        "middle": (True, False, False),
        "last": (True, False, True),
    }
    for name, (split, first, last) in parts.items():
        kept = "*i16" if split else "*fp32"
        tiles = {"BLOCK_V": t.rows, "BLOCK_H": t.columns, "BLOCK_R": t.depth}
        yield build_case(
            f"accumulate {name} {kind}",
            cross_entropy_accumulate_kernel,
            {**fixed, **tiles, "SPLIT": split, "FIRST": first, "LAST": last},
            types={"G": operand(t.depth, t.rows), "X": operand(t.depth, t.columns), "TOTAL": kept, "LOW": kept},
            num_warps=t.warps,
            num_stages=t.stages,
            aligned=("g_stride", "x_stride", "width") if aligned else ("g_stride",),
            **shared,
        )
