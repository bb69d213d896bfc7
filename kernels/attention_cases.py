"""Every attention build that ships, for the cross-compilation gates.

    python -m chatmill.kernels.cross_compile chatmill.kernels.attention_cases [--arch 90] [--match D128]

The tile sizes come from the shipped table (tuning/attention.json); SPILLS holds the measured, accepted spills.
"""

from __future__ import annotations

from typing import Any

from chatmill.kernels.attention_config import TileConfig, padded
from chatmill.kernels.attention_triton import attention_dkdv_kernel, attention_dq_kernel, attention_forward_kernel
from chatmill.kernels.cross_compile import Case


def compile_case(
    kernel: str, config: TileConfig, *, arch: int, D: int, DV: int, element: str = "bf16", causal: bool = True,
    window: bool = False, cap: bool = False, short: bool = False, spill_bytes: int = 0,
) -> Case:  # fmt: skip
    """One configuration of forward, dkdv or dq for cross_compile, with dense rows of 16 heads."""
    function = {"forward": attention_forward_kernel, "dkdv": attention_dkdv_kernel, "dq": attention_dq_kernel}[kernel]
    floats, integers = ("scale", "scale2", "cap2"), ("T", "heads", "kv_heads", "group", "window")
    types, aligned = {}, []
    for name in function.arg_names:
        if name in ("LSE", "DELTA"):
            types[name] = "*fp32"
        elif name in ("TILES", "BOUNDS"):
            types[name] = "*i32"
        elif name in floats:
            types[name] = "fp32"
        elif name in integers:
            types[name] = "i32"
        elif name.endswith("_head"):
            types[name] = "i32"
            aligned.append(name)
        elif name in ("Q", "K", "V", "OUT", "DOUT", "DK", "DV_OUT", "DQ"):
            types[name] = f"*{element}"
    rows = {name: 16 * (DV if name in ("v_row", "o_row", "do_row", "dv_row") else D) for name in function.arg_names}
    constants: dict[str, Any] = {name: stride for name, stride in rows.items() if name.endswith("_row")}
    constants |= {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "CAUSAL": causal, "HAS_WINDOW": window, "HAS_CAP": cap, "PRECISION": "ieee" if element == "fp32" else "tf32",
    }  # fmt: skip
    words = (("window", window), ("cap", cap), ("short", short), ("bidirectional", not causal))
    extras = "".join(f" {word}" for word, on in words if on)
    return Case(
        f"{kernel} D{D if D == DV else f'{D}/{DV}'} {element}{extras}", function, types, constants, arch=arch,
        num_warps=config.num_warps, num_stages=config.num_stages, aligned=tuple(aligned), spill_bytes=spill_bytes,
        tensor_cores=element != "fp32",
    )  # fmt: skip
