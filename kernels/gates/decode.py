"""Every build of the decoding form that ships, for the cross-compilation gates.

python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.decode [--arch 90] [--match D128]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..attention.decode_triton import attention_decode_merge_kernel, attention_decode_stretch_kernel, tile
from ..attention.tiles import padded
from .attention import LITTLE_MEMORY
from .cross_compile import BuildCase, build_case

ARCHS = (80, 89, 90, 100, 120)
# (D, Dv, query heads of one key head)
SHAPES = ((64, 64, 3), (128, 128, 4), (128, 128, 8), (192, 128, 1), (256, 256, 8))


def shipped_cases() -> Iterator[BuildCase]:
    """Every head size, with and without window and soft-cap, and their merge; the largest where memory is little."""
    for arch in ARCHS:
        if arch in LITTLE_MEMORY:
            yield _stretch(arch, *SHAPES[-1], "bf16", plain=True)
            for D in (128, 256):  # the most that is asked of it
                yield _stretch(arch, D, D, 8, "fp32", plain=True)
        else:
            for D, DV, group in SHAPES:
                yield _stretch(arch, D, DV, group, "bf16", plain=True)
            yield _stretch(arch, 128, 128, 4, "bf16", plain=False)
            yield _stretch(arch, 64, 64, 3, "fp16", plain=True)
        for splits in (128,) if arch in LITTLE_MEMORY else (2, 128):
            constants = {"DV": 128, "BLOCK_DV": 128, "BLOCK_S": splits}
            name = f"merge D128 splits {splits}"
            yield build_case(name, attention_decode_merge_kernel, constants, arch=arch, num_warps=4, tensor_cores=False)


def _stretch(arch: int, D: int, DV: int, group: int, element: str, plain: bool) -> BuildCase:
    element_bytes = 4 if element == "fp32" else 2
    block_n, num_stages = tile(D, DV, element_bytes)
    constants: dict[str, Any] = {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "BLOCK_G": padded(group), "BLOCK_N": block_n,
        "HAS_WINDOW": not plain, "HAS_CAP": not plain, "PRECISION": "ieee" if element_bytes == 4 else "tf32",
    }  # fmt: skip
    name = f"stretch D{D if D == DV else f'{D}/{DV}'} group {group} {element}{'' if plain else ' window cap'}"
    options: dict[str, Any] = {"element": element, "arch": arch, "num_warps": 4, "num_stages": num_stages}
    return build_case(name, attention_decode_stretch_kernel, constants, tensor_cores=False, **options)
