"""Configurations of the linear cross-entropy that ship, for the cross-compilation gates.

python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.cross_entropy
"""

from __future__ import annotations

from ..cross_entropy.tiles import ROWS, UNALIGNED, Tile
from ..cross_entropy.triton_tier import GRADIENT_BLOCK, gradient_kernel, project_kernel, statistics_kernel
from ..cross_entropy.weight_gradient import accumulate_kernel
from .cross_compile import Case


def shipped_cases() -> list[Case]:
    """Every tile of the tables as it is launched on a GPU, for the cross-compilation gates."""
    cases = []
    for row in ROWS:
        arch, narrow = row.arch[0], row.bytes == 2
        cases += _product_cases(arch, narrow, (row.project, row.accumulate), arch >= 90, True)
    cases += _product_cases(90, True, UNALIGNED, False, False)
    rows = dict.fromkeys(("OWN", "TOP", "P_SCALE", "HIT_SCALE", "FLOOR"), "*fp32")
    vectors: tuple[str, ...] = ("LDG.E.128", "STG.E.128")
    single = ("LDG.E.U16", "STG.E.U16")
    for softcap in (0.0, 30.0):
        numbers = dict.fromkeys(("n_columns", "logits_stride", "out_stride"), "i32")
        types = {"LOGITS": "*bf16", "OUT": "*bf16", "LABELS": "*i64", **rows, **numbers}
        constants = {"SOFTCAP": softcap, "SMOOTHING": softcap > 0, "BLOCK": GRADIENT_BLOCK}
        name = f"gradient softcap {softcap:g}"
        strides: tuple[str, ...] = ("n_columns", "logits_stride", "out_stride")
        cases.append(
            Case(
                name,
                gradient_kernel,
                types,
                constants,
                num_warps=8,
                aligned=strides,
                tensor_cores=False,
                instructions=vectors,
                forbidden=single,
            )
        )
    types = {"LOGITS": "*bf16", "LABELS": "*i64", "vocabulary": "i32", "logits_stride": "i32"}
    types |= dict.fromkeys(("TILE_MAX", "TILE_SUM", "TILE_TOTAL", "OWN"), "*fp32")
    constants = {"SOFTCAP": 30.0, "NEEDS_TOTAL": True, "BLOCK": GRADIENT_BLOCK}
    strides = ("vocabulary", "logits_stride")
    cases.append(
        Case(
            "statistics",
            statistics_kernel,
            types,
            constants,
            num_warps=8,
            aligned=strides,
            tensor_cores=False,
            instructions=vectors[:1],
            forbidden=single,
        )
    )
    return cases


def _product_cases(arch: int, narrow: bool, pair: tuple[Tile, Tile], described: bool, aligned: bool) -> list[Case]:
    dtype = "bf16" if narrow else "fp32"
    kind = f"{dtype} {'descriptors' if described else 'aligned' if aligned else 'unaligned'}"

    def operand(rows: int, columns: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {columns}]>" if described else f"*{dtype}"

    fixed = {"DESCRIPTORS": described, "PRECISION": "ieee"}
    t = pair[0]
    types = {"X": operand(t.rows, t.depth), "W": operand(t.columns, t.depth), "LOGITS": f"*{dtype}", "LABELS": "*i64"}
    types |= dict.fromkeys(("TILE_MAX", "TILE_SUM", "TILE_TOTAL", "OWN"), "*fp32")
    types |= dict.fromkeys(("n_rows", "vocabulary", "width", "x_stride", "w_stride", "logits_stride", "n_stored"), "i32")
    strides = ("width", "x_stride", "w_stride") if aligned else ()
    cases = []
    for name, softcap, total, store in (("train", 0.0, False, True), ("capped", 30.0, True, True), ("loss", 0.0, False, False)):
        options = {"SOFTCAP": softcap, "NEEDS_TOTAL": total, "STORE": store}
        constants = {**options, **fixed, "BLOCK_R": t.rows, "BLOCK_V": t.columns, "BLOCK_H": t.depth}
        cases.append(
            Case(
                f"project {name} {kind}",
                project_kernel,
                types,
                constants,
                arch=arch,
                num_warps=t.warps,
                num_stages=t.stages,
                aligned=(*strides, "logits_stride", "n_stored"),
                tensor_cores=narrow,
                instructions=("STG.E.128",) if store and aligned and narrow else (),
                forbidden=("STG.E.U16",) if aligned else (),
            )
        )
    t = pair[1]
    base = {"G": operand(t.depth, t.rows), "X": operand(t.depth, t.columns)}
    base |= dict.fromkeys(("n_rows", "vocabulary", "width", "g_stride", "x_stride"), "i32")
    parts = {
        "whole": (False, False, False),
        "first": (True, True, False),
        "middle": (True, False, False),
        "last": (True, False, True),
    }
    for name, (split, first, last) in parts.items():
        kept = "*i16" if split else "*fp32"
        cases.append(
            Case(
                f"accumulate {name} {kind}",
                accumulate_kernel,
                base | {"TOTAL": kept, "LOW": kept},
                {**fixed, "BLOCK_V": t.rows, "BLOCK_H": t.columns, "BLOCK_R": t.depth}
                | {"SPLIT": split, "FIRST": first, "LAST": last},
                arch=arch,
                num_warps=t.warps,
                num_stages=t.stages,
                aligned=("g_stride", "x_stride", "width") if aligned else ("g_stride",),
                tensor_cores=narrow,
            )
        )
    return cases
