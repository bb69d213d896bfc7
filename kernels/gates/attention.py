"""Every attention build that ships, for the cross-compilation gates.

    python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.attention [--arch 90] [--match D128]

One case per kernel, tile shape, head dimension class and GPU generation of the shipped table (tuning/attention.json) in bf16;
the variants (soft-cap, fp16, fp32) once each on Hopper. Windows and causality are not in the binary. SPILLS holds what the
compiler was seen to spill where it could not be avoided: a build may not get worse.
"""

from __future__ import annotations

from typing import Any

from ..attention.device_plan import HOPPER_FORWARD, KernelConfig, TileConfig, kernel_config, padded
from ..attention.triton_tier import attention_dkdv_kernel, attention_dq_kernel, attention_forward_kernel
from .cross_compile import Case

KERNELS = {"forward": attention_forward_kernel, "dkdv": attention_dkdv_kernel, "dq": attention_dq_kernel}
# generations that ship: A100, Hopper, Blackwell; (D, Dv, with the small tiles of short documents too)
ARCHS = (80, 90, 100)
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
}
# the fused backward: addresses, a few of them fetched again in every step; the 64 keys per tile that would spill nothing
# double what is added to dq in memory
SPILLS_FUSED = {(128, 128): 128}
FEW = 32  # saved once, outside the loops
# scalars and addresses kept from tile to tile; clean_loops sees to it that no step pays for them
SPILLS_HOPPER = 384


def shipped_cases() -> list[Case]:
    """What must compile clean."""
    cases = []
    for arch in ARCHS:
        for D, DV, has_short in DIMS:
            for short in (False, True) if has_short else (False,):
                config = kernel_config(arch, 2, max(D, DV), short)
                for kernel in KernelConfig._fields:
                    budget = SPILLS.get((kernel, D, arch), FEW)
                    cases.append(
                        compile_case(kernel, getattr(config, kernel), arch=arch, D=D, DV=DV, short=short, spill_bytes=budget)
                    )
    hopper, exact = kernel_config(90, 2, 64, False), kernel_config(90, 4, 64, False)
    for kernel in KernelConfig._fields:
        tiles = getattr(hopper, kernel)
        cases.append(compile_case(kernel, tiles, arch=90, D=64, DV=64, cap=True, spill_bytes=FEW))
        cases.append(compile_case(kernel, tiles, arch=90, D=64, DV=64, element="fp16"))
        cases.append(compile_case(kernel, getattr(exact, kernel), arch=90, D=64, DV=64, element="fp32", spill_bytes=1 << 16))
    return cases + hopper_cases() + hopper_backward_cases()


def hopper_cases() -> list[Case]:
    """The Hopper tier's forward; fp16 and the soft-cap once each."""
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16

    from ..attention.hopper_forward import attention_forward_hopper_kernel

    def blocks(rows: int, D: int, element: str) -> str:
        layout = NVMMASharedLayout.get_default_for([rows, D], bfloat16 if element == "bf16" else float16)
        return f"tensordesc<{element}[{rows}, {D}],{layout!r}>"

    cases = []
    for D, (block_m, block_n, num_warps, stages) in HOPPER_FORWARD.items():
        for element, cap in (("bf16", False), ("fp16", False) if D == 64 else ("bf16", True)):
            types = {"OUT": f"*{element}", "LSE": "*fp32", "TILES": "*i32", "BOUNDS": "*i32", "scale2": "fp32", "cap2": "fp32"}
            types |= dict.fromkeys(("T", "tiles", "heads", "group", "together"), "i32")
            types |= {"q_desc": blocks(block_m // 2, D, element), "k_desc": blocks(block_n, D, element)}
            types |= {"v_desc": types["k_desc"]}
            cases.append(
                Case(
                    f"forward hopper D{D} {element}{' cap' * cap}",
                    attention_forward_hopper_kernel,
                    types,
                    {"O_ROW": 16 * D, "STAGES": stages, "HAS_CAP": cap},
                    arch=90,
                    num_warps=num_warps,
                    spill_bytes=SPILLS_HOPPER if D == 128 else 0,
                    specialised=True,
                    instructions=("UTMALDG", "WARPGROUP.DEPBAR"),
                    clean_loops=True,
                    # 64 rows x 128 keys on 128 threads
                    overlapped=64,
                )
            )
    return cases


def hopper_backward_cases() -> list[Case]:
    """The fused backward, with the key tiles of the table's dk and dv; fp16 and the soft-cap once each."""
    from ..attention import hopper_backward as fused

    cases = []
    variants = [(D, short, "bf16", False) for D in fused.DIMS for short in (False, True)]
    variants += [(64, False, "fp16", False), (64, False, "bf16", True)]
    for D, short, element, cap in variants:
        block_m, block_n = kernel_config(90, 2, D, short).dkdv[:2]
        num_warps, num_stages = fused.launch_shape(D, block_n)
        types = {name: _type_of(name, element) for name in fused.attention_backward_hopper_kernel.arg_names}
        types |= dict.fromkeys(("Q", "DOUT"), f"tensordesc<{element}[{block_m}, {D}]>")
        types |= dict.fromkeys("KV", f"tensordesc<{element}[{block_n}, {D}]>")
        types |= {"DQ_SUM": f"tensordesc<fp32[{block_m}, {D}]>", "DV": f"*{element}"}
        types |= dict.fromkeys(("LSE2", "DELTA"), f"tensordesc<fp32[1, {block_m}]>")
        constants = {"D": D, "BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_CAP": cap}
        cases.append(
            Case(
                f"backward hopper fused D{D} {element}{' cap' * cap}{' short' * short}",
                fused.attention_backward_hopper_kernel,
                {name: kind for name, kind in types.items() if name not in constants},
                constants,
                arch=90,
                num_warps=num_warps,
                num_stages=num_stages,
                aligned=("q_head", "k_head", "v_head", "do_head"),
                spill_bytes=SPILLS_FUSED.get((D, block_n), 0),
                instructions=("UTMALDG", "UTMAREDG"),
            )
        )
    passes = (
        (fused.backward_prepare_kernel, {"D": 128, "BLOCK_M": fused.ROWS, "HAS_DLSE": True}),
        (
            fused.backward_finish_kernel,
            {"BLOCK": fused.FINISH_BLOCK},
        ),
    )
    for kernel, constants in passes:
        kinds = {"LSE": "*fp32", "DLSE": "*fp32", "LSE2": "*fp32", "DELTA": "*fp32", "DQ_SUM": "*fp32", "scale": "fp32"}
        types = {n: kinds.get(n, _type_of(n, "bf16")) for n in kernel.arg_names if n not in constants}
        strides = tuple(name for name in types if name.endswith(("_row", "_head")))
        name = f"backward hopper {kernel.__name__}"
        cases.append(Case(name, kernel, types, constants, arch=90, aligned=strides, tensor_cores=False))
    return cases


def compile_case(
    kernel: str, config: TileConfig, *, arch: int, D: int, DV: int, element: str = "bf16",
    cap: bool = False, short: bool = False, spill_bytes: int = 0,
) -> Case:  # fmt: skip
    """One configuration of forward, dkdv or dq, with dense rows of 16 heads."""
    function = KERNELS[kernel]
    types = {name: _type_of(name, element) for name in function.arg_names}
    rows = {name: 16 * (DV if name in ("v_row", "o_row", "do_row", "dv_row") else D) for name in types if name.endswith("_row")}
    constants: dict[str, Any] = rows | {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "HAS_CAP": cap, "PRECISION": "ieee" if element == "fp32" else "tf32",
    }  # fmt: skip
    extras = " cap" * cap + " short" * short
    return Case(
        f"{kernel} D{D if D == DV else f'{D}/{DV}'} {element}{extras}",
        function,
        {name: kind for name, kind in types.items() if name not in constants},
        constants,
        arch=arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name in types if name.endswith("_head")),
        spill_bytes=spill_bytes,
        tensor_cores=element != "fp32",
    )


def _type_of(name: str, element: str) -> str:
    if name in ("LSE", "DELTA"):
        return "*fp32"
    if name in ("TILES", "BOUNDS"):
        return "*i32"
    if name in ("scale", "scale2", "cap2"):
        return "fp32"
    return f"*{element}" if name in ("Q", "K", "V", "OUT", "DOUT", "DK", "DV_OUT", "DQ") else "i32"
