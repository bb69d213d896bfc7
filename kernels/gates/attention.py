"""Every attention build that ships, for the cross-compilation gates.

    python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.attention [--arch 90] [--match D128]

One case per kernel, tile shape, head dimension class and GPU generation of the shipped table (tuning/attention.json) in bf16;
the variants (soft-cap, fp16, fp32) once each on Hopper. Windows and causality are not in the binary. SPILLS holds what the
compiler was seen to spill where it could not be avoided: a build may not get worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..attention.tiles import HOPPER_FORWARD, KernelConfig, TileConfig, kernel_config, padded
from ..attention.triton_tier import attention_dkdv_kernel, attention_dq_kernel, attention_forward_kernel
from .cross_compile import BuildCase, build_case

KERNELS = {"forward": attention_forward_kernel, "dkdv": attention_dkdv_kernel, "dq": attention_dq_kernel}
# generations that ship: A100, Ada, Hopper, Blackwell of data centres and of desktops; (D, Dv, with the small tiles of short
# documents too). Ada and desktop Blackwell run A100's code with less shared memory: there the largest tiles are compiled.
ARCHS = (80, 89, 90, 100, 120)
LITTLE_MEMORY = (89, 120)
DIMS = ((64, 64, True), (80, 80, False), (128, 128, True), (192, 128, False), (256, 256, False))
# bytes spilled, by kernel, D and generation, where triton 3.6 or 3.7 goes past FEW: addresses and, at D = 256, part of what its
# masked steps hold; its unmasked steps touch no spilled register, those of D = 80 and 128 two or three. With one pipeline
# stage, tiles are fetched through registers: 504 bytes at D = 192 and 1,820 at 256
SPILLS = {
    ("forward", 80, 80): 48,
    ("forward", 128, 80): 48,
    ("dkdv", 80, 90): 176,
    ("dkdv", 128, 90): 176,
    ("dkdv", 256, 90): 256,
    # by Blackwell's own ptxas, which triton takes from sm_100 on; docs/log.md says how much of it lies in matrix loops
    ("dkdv", 256, 100): 96,
    ("forward", 64, 120): 192,
    ("forward", 128, 120): 288,
    ("dkdv", 64, 120): 48,
    ("dkdv", 256, 120): 128,
}
FEW = 32  # saved once, outside the loops
# the Hopper forward: scalars and addresses kept from tile to tile, by D, until triton 3.8 and from 3.9 on (which asks ptxas
# for another allocation of registers, --regAllocOptLevel=2); none in a matrix loop
SPILLS_HOPPER = {64: 0, 128: 384}
SPILLS_HOPPER_39 = {64: 212, 128: 396}


def shipped_cases() -> Iterator[BuildCase]:
    """What must compile clean."""
    for arch in ARCHS:
        for D, DV, has_short in DIMS:
            if arch in LITTLE_MEMORY and D not in (64, 128, 256):
                continue
            for short in (False, True) if has_short and arch not in LITTLE_MEMORY else (False,):
                config = kernel_config(arch, 2, max(D, DV), short)
                for kernel in KernelConfig._fields:
                    budget = SPILLS.get((kernel, D, arch), FEW)
                    yield portable_case(kernel, getattr(config, kernel), arch, D, DV, short=short, spill_bytes=budget)
    hopper, exact = kernel_config(90, 2, 64, False), kernel_config(90, 4, 64, False)
    for kernel in KernelConfig._fields:
        tiles = getattr(hopper, kernel)
        yield portable_case(kernel, tiles, 90, 64, 64, cap=True, spill_bytes=FEW)
        yield portable_case(kernel, tiles, 90, 64, 64, element="fp16")
        yield portable_case(kernel, getattr(exact, kernel), 90, 64, 64, element="fp32", spill_bytes=1 << 16)
    yield from hopper_cases()
    yield from hopper_backward_cases()


def hopper_cases() -> Iterator[BuildCase]:
    """The Hopper tier's forward; fp16 and the soft-cap once each."""
    import triton
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    budgets = SPILLS_HOPPER if version < (3, 9) else SPILLS_HOPPER_39

    from ..attention.hopper.forward import attention_forward_hopper_kernel

    def blocks(rows: int, D: int, element: str) -> str:
        layout = NVMMASharedLayout.get_default_for([rows, D], bfloat16 if element == "bf16" else float16)
        return f"tensordesc<{element}[{rows}, {D}],{layout!r}>"

    for D, (block_m, block_n, num_warps, stages) in HOPPER_FORWARD.items():
        for element, cap in (("bf16", False), ("fp16", False) if D == 64 else ("bf16", True)):
            keys = blocks(block_n, D, element)
            yield build_case(
                f"forward hopper D{D} {element}{' cap' * cap}",
                attention_forward_hopper_kernel,
                {"O_ROW": 16 * D, "STAGES": stages, "HAS_CAP": cap},
                element=element,
                types={"q_desc": blocks(block_m // 2, D, element), "k_desc": keys, "v_desc": keys},
                num_warps=num_warps,
                spill_bytes=budgets[D],
                specialised=True,
                instructions=("UTMALDG", "WARPGROUP.DEPBAR"),
                # 64 rows x 128 keys on 128 threads
                overlapped=64,
            )


def hopper_backward_cases() -> Iterator[BuildCase]:
    """The fused backward, with the key tiles of the table's dk and dv; fp16 and the soft-cap once each."""
    from ..attention.hopper import backward as fused

    variants = [(D, short, "bf16", False) for D in fused.DIMS for short in (False, True)]
    variants += [(64, False, "fp16", False), (64, False, "bf16", True)]
    for D, short, element, cap in variants:
        block_m, block_n = kernel_config(90, 2, D, short).dkdv[:2]
        num_warps, num_stages = fused.launch_shape(D, block_n)
        types = dict.fromkeys(("Q", "DOUT"), f"tensordesc<{element}[{block_m}, {D}]>")
        types |= dict.fromkeys("KV", f"tensordesc<{element}[{block_n}, {D}]>")
        types |= {"DQ_SUM": f"tensordesc<fp32[{block_m}, {D}]>"}
        types |= dict.fromkeys(("LSE2", "DELTA"), f"tensordesc<fp32[1, {block_m}]>")
        yield build_case(
            f"backward hopper fused D{D} {element}{' cap' * cap}{' short' * short}",
            fused.attention_backward_hopper_kernel,
            {"D": D, "BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_CAP": cap},
            element=element,
            types=types,
            num_warps=num_warps,
            num_stages=num_stages,
            instructions=("UTMALDG", "UTMAREDG"),
        )
    prepare = {"D": 128, "BLOCK_M": fused.ROWS, "HAS_DLSE": True}
    for kernel, constants in (
        (fused.attention_hopper_backward_prepare_kernel, prepare),
        (fused.attention_hopper_backward_finish_kernel, {"BLOCK": fused.FINISH_BLOCK}),
    ):
        yield build_case(f"backward hopper {kernel.__name__}", kernel, constants, tensor_cores=False)


def portable_case(
    kernel: str, tiles: TileConfig, arch: int, D: int, DV: int, *, element: str = "bf16",
    cap: bool = False, short: bool = False, spill_bytes: int = 0,
) -> BuildCase:  # fmt: skip
    """One configuration of forward, dkdv or dq, with dense rows of 16 heads."""
    function = KERNELS[kernel]
    wide = ("v_row", "o_row", "do_row", "dv_row")
    rows = {name: 16 * (DV if name in wide else D) for name in function.arg_names if name.endswith("_row")}
    constants: dict[str, Any] = rows | {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "HAS_CAP": cap, "PRECISION": "ieee" if element == "fp32" else "tf32",
    }  # fmt: skip
    return build_case(
        f"{kernel} D{D if D == DV else f'{D}/{DV}'} {element}{' cap' * cap}{' short' * short}",
        function,
        constants,
        element=element,
        arch=arch,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        spill_bytes=spill_bytes,
        loop_spills=spill_bytes // 4,
        tensor_cores=element != "fp32",
    )
