"""What test_dry_launch.py reads, in a process without the interpreter: dry launches of what ships, and of planted faults."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from unittest import mock

import torch

from chatmill.kernels.attention.interface import attention
from chatmill.kernels.attention.tile_map import make_tile_map
from chatmill.kernels.cross_entropy import tiles
from chatmill.kernels.gates.dry_launch import dry_launches, shipped_kernels
from chatmill.kernels.gates.fake_gpu import fake_gpu
from chatmill.kernels.layer import rms_norm_triton, swiglu_triton

# everything on Hopper, which has every kernel, but widths and head sizes that differ by a number alone; elsewhere what differs
SHIPPED = {
    90: r"^(?!rms_norm (64|2048|4096) |rms_norm .*fp32$|rope (64|96) |attention D(80|96) )",
    80: r"^attention D(64|128) bf16 long|^loss bf16 in chunks|^decode D128 group 4",
    89: r"^attention D256 bf16 long|^decode D256 fp32",
    100: r"^attention D(128|256) bf16 long|^loss bf16 in chunks",
    120: r"^attention D256 bf16 long|^loss bf16 in chunks|^decode D256 fp32",
}


def missing_constant() -> None:
    x = torch.empty(4, 64)
    rms_norm_triton.rms_norm_forward_kernel[(1,)](x, x, x, x, x, x, 4, 64, 64, 64, 1e-6, HAS_RESIDUAL=False, ROWS=4)


def wrong_type() -> None:
    q, k = torch.empty(64, 1, 64, dtype=torch.bfloat16), torch.empty(64, 1, 64)
    with mock.patch("chatmill.kernels.attention.interface._check"):
        attention(q, k, k, impl="triton", tile_map=make_tile_map([0, 64], 64, head_dim=64, device=q.device))


def rows_between_16_bytes() -> None:
    with mock.patch.object(tiles, "is_aligned", lambda matrix: True):
        run("^loss bf16 of unaligned rows")


def grid_too_wide() -> None:
    x = torch.empty(1, swiglu_triton.TILE * 65_536, dtype=torch.bfloat16)  # never touched: no memory
    swiglu_triton.forward(x, x)


def too_much_shared_memory() -> None:
    row = tiles.row_for(120, 2)
    with mock.patch.object(tiles, "row_for", lambda *_: mock.Mock(project=row.project._replace(stages=6), accumulate=None)):
        run("^loss bf16 without gradients")


def no_fused_multiply_add() -> None:
    with mock.patch.dict(os.environ, {"TRITON_DEFAULT_FP_FUSION": "0"}):
        run("^swiglu 1536 bf16")


def run(match: str) -> None:
    """Inside fake_gpu: the cases themselves."""
    import re

    from chatmill.kernels.gates.launches import Sizes, launch_cases

    for case in launch_cases(90, Sizes()):
        if re.search(match, case.name):
            case.run()


FAULTS: dict[Callable[[], None], tuple[int, bool]] = {
    missing_constant: (90, True), wrong_type: (90, True), rows_between_16_bytes: (90, True),
    grid_too_wide: (90, True), too_much_shared_memory: (120, False), no_fused_multiply_add: (100, True),
}  # fmt: skip


def main() -> None:
    """Print outcomes, kernels never launched, and what each planted fault raised."""
    outcomes = [asdict(outcome) for arch, match in SHIPPED.items() for outcome in dry_launches(arch, match, quick=True)]
    launched = {kernel for outcome in outcomes if outcome["arch"] == 90 for kernel in outcome["kernels"]}
    found = {}
    for fault, (arch, quick) in FAULTS.items():
        try:
            with fake_gpu(arch, quick):
                fault()
        except Exception as error:
            found[fault.__name__] = f"{type(error).__name__}: {error}"
        else:
            found[fault.__name__] = "nothing was raised"
    json.dump({"outcomes": outcomes, "missed": sorted(shipped_kernels(90) - launched), "faults": found}, sys.stdout)


if __name__ == "__main__":
    main()
