"""Every build of the decoding form that ships, for the cross-compilation gates.

python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.decode [--arch 90] [--match D128]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..attention.decode_triton import BLOCK_N, decode_merge_kernel, decode_stretch_kernel, stages
from ..attention.tiles import padded
from .cross_compile import BuildCase, build_case

ARCHS = (80, 90, 100)
# (D, Dv, query heads of one key head)
SHAPES = ((64, 64, 3), (128, 128, 4), (128, 128, 8), (192, 128, 1), (256, 256, 8))


def shipped_cases() -> Iterator[BuildCase]:
    """Stretches of every head size with and without window and soft-cap, and their merge."""
    for arch in ARCHS:
        for D, DV, group in SHAPES:
            yield _stretch(arch, D, DV, group, "bf16", plain=True)
        yield _stretch(arch, 128, 128, 4, "bf16", plain=False)
        yield _stretch(arch, 64, 64, 3, "fp16", plain=True)
        for splits in (2, 128):
            constants = {"DV": 128, "BLOCK_DV": 128, "BLOCK_S": splits}
            name = f"merge D128 splits {splits}"
            yield build_case(name, decode_merge_kernel, constants, arch=arch, num_warps=4, tensor_cores=False)


def _stretch(arch: int, D: int, DV: int, group: int, element: str, plain: bool) -> BuildCase:
    constants: dict[str, Any] = {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "BLOCK_G": padded(group), "BLOCK_N": BLOCK_N,
        "HAS_WINDOW": not plain, "HAS_CAP": not plain, "PRECISION": "tf32",
    }  # fmt: skip
    name = f"stretch D{D if D == DV else f'{D}/{DV}'} group {group} {element}{'' if plain else ' window cap'}"
    launch: dict[str, Any] = {"num_warps": 4, "num_stages": stages(D, DV, element_bytes=2)}
    return build_case(name, decode_stretch_kernel, constants, element=element, arch=arch, tensor_cores=False, **launch)
