"""Every attention build that ships, compiled for A100, Hopper and Blackwell: the gates of cross_compile."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import chatmill.kernels.cross_compile as gates

SOURCE = Path(gates.__file__).resolve().parents[1]


def compiled(arch: int, match: str = "", cases: str = "attention_cases") -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, rows and stderr of the command line, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE / "src"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "chatmill.kernels.cross_compile", f"chatmill.kernels.{cases}", "--json"]
    done = subprocess.run(
        [*command, "--arch", str(arch), "--match", match], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout or "[]"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_shipped_build_passes_its_gates(arch: int) -> None:
    status, rows, stderr = compiled(arch)
    broken = {row["name"]: row["violations"] for row in rows if row["violations"]}
    assert not broken
    assert status == 0, stderr
    assert len(rows) >= 21


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


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_build_of_the_decoding_form_passes_its_gates(arch: int) -> None:
    status, rows, stderr = compiled(arch, cases="decode_cases")
    assert status == 0, stderr
    stretches = [row for row in rows if row["name"].startswith("stretch")]
    assert len(stretches) == 7 and len(rows) == 9
    # 16 query rows are one mma tile, too few for a warp group's
    assert all(row["sass"]["HMMA"] > 0 and row["spill_bytes"] == 0 for row in stretches)
