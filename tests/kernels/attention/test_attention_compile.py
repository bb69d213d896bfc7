"""Every attention build that ships, compiled for A100, Hopper and Blackwell: the gates of cross_compile."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import chatmill.kernels.gates.cross_compile as gates

SOURCE = Path(gates.__file__).resolve().parents[2]


def compiled(arch: int, match: str = "", cases: str = "attention") -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, rows and stderr of the command line, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE / "src"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "chatmill.kernels.gates.cross_compile", f"chatmill.kernels.gates.{cases}", "--json"]
    done = subprocess.run(
        [*command, "--arch", str(arch), "--match", match], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout or "[]"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_every_shipped_build_passes_its_gates(arch: int) -> None:
    status, rows, stderr = compiled(arch)
    broken = {row["name"]: row["violations"] for row in rows if row["violations"]}
    assert not broken
    assert status == 0, stderr
    assert len(rows) == {80: 21, 89: 9, 90: 42, 100: 21, 120: 9}[arch]
    if arch == 90:
        budgets_hold(rows)


# builds whose third stage does not fit: registers, or the second block of a multiprocessor
UNHIDDEN = ("forward D256 bf16", "dkdv D256 bf16", "dq D128 bf16 short")
# instructions of a step without a mask, per exponential; the soft-cap's have three exponentials a score
STEPS = {"forward D64 bf16": 7.0, "forward D128 bf16": 10.5, "forward hopper D64 bf16": 6.7, "forward hopper D128 bf16": 7.3}


def budgets_hold(rows: list[dict[str, Any]]) -> None:
    """Copies are asked for a step ahead; where every pair is seen no mask is computed, and little beside the softmax."""
    for row in rows:
        late = [loop for loop in row["loops"] if loop["in_flight"] == 0]
        assert bool(late) == (row["name"] in UNHIDDEN), f"{row['name']}: waits for the copy that it has just asked for"
    for row in rows:
        if row["name"] in STEPS:
            inner = [loop for loop in row["loops"] if loop["selections"] == 0]
            assert len(inner) * 2 == len(row["loops"]), f"{row['name']}: a mask in the steps in which every pair is seen"
            most = max(loop["instructions"] / loop["exponentials"] for loop in inner)
            assert most <= STEPS[row["name"]], f"{row['name']}: {most:.1f} instructions per exponential"


@pytest.mark.slow
def test_the_hopper_tier_is_really_specialised() -> None:
    status, rows, stderr = compiled(90, "forward hopper")
    assert status == 0, stderr
    assert len(rows) == 4
    for row in rows:
        assert row["sass"]["USETMAXREG"] > 0
        assert row["sass"]["UTMALDG"] > 0
        assert row["warps"] == 12, "two groups of four warps, and the loader's"
        assert row["loop_spills"] == 0 and row["overlapped"] >= 64


@pytest.mark.slow
def test_the_fused_backward_loads_and_adds_by_tma() -> None:
    status, rows, stderr = compiled(90, "hopper fused")
    assert status == 0, stderr
    assert len(rows) == 6
    for row in rows:
        assert row["sass"]["UTMAREDG"] == 1
        assert row["sass"]["WARPGROUP.ARRIVE"] == 5, "one wgmma group per product, none split or serialised"


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_every_build_of_the_decoding_form_passes_its_gates(arch: int) -> None:
    status, rows, stderr = compiled(arch, cases="decode")
    assert status == 0, stderr
    stretches = [row for row in rows if row["name"].startswith("stretch")]
    assert len(stretches) == (9 if arch in (89, 120) else 7) and len(rows) == len(stretches) + 2
    # 16 query rows are one mma tile, too few for a warp group's; fp32 is multiplied without tensor cores
    assert all((row["sass"].get("HMMA", 0) > 0) != row["name"].endswith("fp32") for row in stretches)
    assert all(row["spill_bytes"] == 0 for row in stretches)
