"""Configurations of RMSNorm, rotary positions and SwiGLU that ship, for the cross-compilation gates.

python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.layer
"""

from __future__ import annotations

from collections.abc import Iterator

import triton

from ..layer import rms_norm_triton, rope_triton, swiglu_triton
from .cross_compile import WHOLE_VECTORS, BuildCase, build_case


def shipped_cases() -> Iterator[BuildCase]:
    """Head and model widths from 64 to 8192, with and without the optional parts."""
    yield from rms_norm_cases()
    yield from rope_cases()
    yield from swiglu_cases()


def rms_norm_cases() -> Iterator[BuildCase]:
    """RMSNorm."""
    for width in (64, 576, 2048, 4096, 8192):
        rows, block, warps = rms_norm_triton._tile(width)
        for extra in (False, True):
            name, shape = f"rms_norm {'residual ' if extra else ''}{width}", {"ROWS": rows, "BLOCK": block}
            forward = shape | {"HAS_RESIDUAL": extra}
            stages = rms_norm_triton._stages(rows * block * 2 * (3 if extra else 2))
            backward = shape | {"HAS_DH": extra, "NEED_X": True, "NEED_WEIGHT": True, "STAGES": stages}
            kernels = rms_norm_triton.rms_norm_forward_kernel, rms_norm_triton.rms_norm_backward_kernel
            yield build_case(f"{name} forward", kernels[0], forward, num_warps=warps, **WHOLE_VECTORS)
            yield build_case(f"{name} backward", kernels[1], backward, num_warps=warps, **WHOLE_VECTORS)


def rope_cases() -> Iterator[BuildCase]:
    """Rotary positions."""
    for width in (64, 80, 96, 128):
        block = triton.next_power_of_2(width // 2)
        rows, heads = rope_triton.TILE // block, rope_triton.HEADS
        shape = {"DOUBLE": False, "HALF": width // 2, "HEADS": heads, "ROWS": rows, "BLOCK": block}
        for norm, backward in ((False, False), (False, True), (True, False)):
            name = f"rope{' norm' if norm else ''} {width} {'backward' if backward else 'forward'}"
            yield build_case(name, rope_triton.rope_kernel, shape | {"BACKWARD": backward, "NORM": norm}, **WHOLE_VECTORS)
        yield build_case(f"rope norm {width} backward", rope_triton.rope_norm_backward_kernel, shape, **WHOLE_VECTORS)


def swiglu_cases() -> Iterator[BuildCase]:
    """SwiGLU."""
    for width in (1536, 8192):
        rows, block = swiglu_triton.tile(width)
        constants = {"DOUBLE": False, "ROWS": rows, "BLOCK": block}
        yield build_case(f"swiglu {width} forward", swiglu_triton.swiglu_forward_kernel, constants, **WHOLE_VECTORS)
        yield build_case(f"swiglu {width} backward", swiglu_triton.swiglu_backward_kernel, constants, **WHOLE_VECTORS)
