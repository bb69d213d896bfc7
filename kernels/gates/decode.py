"""Every build of the decoding form that ships, for the cross-compilation gates.

python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.decode [--arch 90] [--match D128]
"""

from __future__ import annotations

from typing import Any

from ..attention.decode_triton import BLOCK_N, decode_merge_kernel, decode_stretch_kernel, stages
from ..attention.device_plan import padded
from .cross_compile import Case

ARCHS = (80, 90, 100)
# (D, Dv, query heads of one key head)
SHAPES = ((64, 64, 3), (128, 128, 4), (128, 128, 8), (192, 128, 1), (256, 256, 8))


def shipped_cases() -> list[Case]:
    """Stretches of every head size with and without window and soft-cap, and their merge."""
    cases = []
    for arch in ARCHS:
        for D, DV, group in SHAPES:
            cases.append(_stretch(arch, D, DV, group, "bf16", plain=True))
        cases.append(_stretch(arch, 128, 128, 4, "bf16", plain=False))
        cases.append(_stretch(arch, 64, 64, 3, "fp16", plain=True))
        for splits in (2, 128):
            types = dict.fromkeys(("PART", "TOP", "TOTAL"), "*fp32") | {"OUT": "*bf16", "splits": "i32"}
            constants = {"DV": 128, "BLOCK_DV": 128, "BLOCK_S": splits}
            name = f"merge D128 splits {splits}"
            cases.append(Case(name, decode_merge_kernel, types, constants, arch=arch, num_warps=4, tensor_cores=False))
    return cases


def _stretch(arch: int, D: int, DV: int, group: int, element: str, plain: bool) -> Case:
    types = dict.fromkeys("QKV", f"*{element}") | dict.fromkeys(("PART", "TOP", "TOTAL"), "*fp32") | {"LENGTHS": "*i32"}
    strides = ("q_batch", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head")
    types |= dict.fromkeys(("splits", "kv_heads", "group", "window", *strides), "i32") | dict.fromkeys(
        ("scale2", "cap2"), "fp32"
    )
    constants: dict[str, Any] = {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "BLOCK_G": padded(group), "BLOCK_N": BLOCK_N,
        "HAS_WINDOW": not plain, "HAS_CAP": not plain, "PRECISION": "tf32",
    }  # fmt: skip
    name = f"stretch D{D if D == DV else f'{D}/{DV}'} group {group} {element}{'' if plain else ' window cap'}"
    return Case(
        name,
        decode_stretch_kernel,
        types,
        constants,
        arch=arch,
        num_warps=4,
        num_stages=stages(D, DV, element_bytes=2),
        aligned=strides,
        tensor_cores=False,
    )
