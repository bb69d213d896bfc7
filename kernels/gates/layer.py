"""Configurations of RMSNorm, rotary positions and SwiGLU that ship, for the cross-compilation gates.

python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.layer
"""

from __future__ import annotations

import triton

from ..layer import rms_norm_triton, rope_triton, swiglu_triton
from .cross_compile import Case

# 16 bytes at a time both ways: a mask or stride that the compiler cannot see through costs up to eight times the accesses
WHOLE_VECTORS = ("LDG.E.128", "STG.E.128")
SINGLE = ("LDG.E.U16", "STG.E.U16")


def shipped_cases() -> list[Case]:
    """Head and model widths from 64 to 8192, with and without the optional parts."""
    return rms_norm_cases() + rope_cases() + swiglu_cases()


def rms_norm_cases() -> list[Case]:
    """RMSNorm."""
    cases = []
    for width in (64, 576, 2048, 4096, 8192):
        rows, block, warps = rms_norm_triton._tile(width)
        for extra in (False, True):
            name = f"rms_norm {'residual ' if extra else ''}{width}"
            types = dict.fromkeys(("X", "RESIDUAL", "WEIGHT", "Y", "H"), "*bf16") | {"SCALE": "*fp32", "eps": "fp32"}
            types |= dict.fromkeys(("n_rows", "width", "x_stride", "residual_stride"), "i32")
            constants = {"HAS_RESIDUAL": extra, "ROWS": rows, "BLOCK": block}
            cases.append(
                Case(
                    f"{name} forward",
                    rms_norm_triton.rms_norm_forward_kernel,
                    types,
                    constants,
                    num_warps=warps,
                    aligned=("width", "x_stride", "residual_stride"),
                    tensor_cores=False,
                    instructions=WHOLE_VECTORS,
                    forbidden=SINGLE,
                )
            )
            types = dict.fromkeys(("H", "WEIGHT", "DY", "DH", "DX"), "*bf16") | {"SCALE": "*fp32", "PARTIAL": "*fp32"}
            types |= dict.fromkeys(("n_rows", "width", "h_stride", "dy_stride", "dh_stride", "n_blocks"), "i32")
            stages = rms_norm_triton._stages(rows * block * 2 * (3 if extra else 2))
            constants = {"HAS_DH": extra, "NEED_X": True, "NEED_WEIGHT": True, "STAGES": stages, "ROWS": rows, "BLOCK": block}
            cases.append(
                Case(
                    f"{name} backward",
                    rms_norm_triton.rms_norm_backward_kernel,
                    types,
                    constants,
                    num_warps=warps,
                    aligned=("width", "h_stride", "dy_stride", "dh_stride"),
                    tensor_cores=False,
                    instructions=WHOLE_VECTORS,
                    forbidden=SINGLE,
                )
            )
    return cases


def rope_cases() -> list[Case]:
    """Rotary positions."""
    cases = []
    for width in (64, 80, 96, 128):
        block = triton.next_power_of_2(width // 2)
        shape = {
            "DOUBLE": False,
            "HALF": width // 2,
            "HEADS": rope_triton.HEADS,
            "ROWS": rope_triton.TILE // block,
            "BLOCK": block,
        }
        tables = {"COS": "*fp32", "SIN": "*fp32", "WEIGHT": "*bf16", "SCALE": "*fp32"}
        numbers = ("n_positions", "n_heads", "x_stride", "x_head_stride", "cos_stride")
        for norm, backward in ((False, False), (False, True), (True, False)):
            types = {"X": "*bf16", "Y": "*bf16", "eps": "fp32"} | tables | dict.fromkeys(numbers, "i32")
            constants = {"BACKWARD": backward, "NORM": norm} | shape
            cases.append(
                Case(
                    f"rope{' norm' if norm else ''} {width} {'backward' if backward else 'forward'}",
                    rope_triton.rope_kernel,
                    types,
                    constants,
                    aligned=("x_stride", "x_head_stride", "cos_stride"),
                    tensor_cores=False,
                    instructions=WHOLE_VECTORS,
                    forbidden=SINGLE,
                )
            )
        types = {"X": "*bf16", "DY": "*bf16", "DX": "*bf16", "PARTIAL": "*fp32"} | tables
        types |= dict.fromkeys((*numbers, "dy_stride", "dy_head_stride", "n_blocks"), "i32")
        strides = ("x_stride", "x_head_stride", "dy_stride", "dy_head_stride", "cos_stride")
        cases.append(
            Case(
                f"rope norm {width} backward",
                rope_triton.rope_norm_backward_kernel,
                types,
                shape,
                aligned=strides,
                tensor_cores=False,
                instructions=WHOLE_VECTORS,
                forbidden=SINGLE,
            )
        )
    return cases


def swiglu_cases() -> list[Case]:
    """SwiGLU."""
    forward = dict.fromkeys(("GATE", "UP", "Y"), "*bf16")
    forward |= dict.fromkeys(("n_rows", "width", "gate_stride", "up_stride"), "i32")
    backward = dict.fromkeys(("GATE", "UP", "DY", "DGATE", "DUP"), "*bf16")
    backward |= dict.fromkeys(("n_rows", "width", "gate_stride", "up_stride", "dy_stride"), "i32")
    strides = ("width", "gate_stride", "up_stride")
    cases = []
    for width in (1536, 8192):
        rows, block = swiglu_triton.tile(width)
        constants = {"DOUBLE": False, "ROWS": rows, "BLOCK": block}
        for name, kernel, types, aligned in (
            ("forward", swiglu_triton.swiglu_forward_kernel, forward, strides),
            ("backward", swiglu_triton.swiglu_backward_kernel, backward, (*strides, "dy_stride")),
        ):
            cases.append(
                Case(
                    f"swiglu {width} {name}",
                    kernel,
                    types,
                    constants,
                    aligned=aligned,
                    tensor_cores=False,
                    instructions=WHOLE_VECTORS,
                    forbidden=SINGLE,
                )
            )
    return cases
