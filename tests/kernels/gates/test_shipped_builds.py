"""Kernel builds that ship for Hopper, compiled once for all tests here; with --exhaustive those for sm_120, too.

sm_120 has the least shared memory. `make gates` compiles those of all generations, which takes five times as long.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import chatmill.kernels.gates.cross_compile as gates

SOURCE = Path(gates.__file__).resolve().parents[2] / "src"
pytestmark = pytest.mark.slow
Rows = list[dict[str, Any]]


def generations(config: pytest.Config) -> tuple[int, ...]:
    return (90, 120) if config.getoption("--exhaustive") else (90,)


# every case that ships as [operation, architecture], then the reports of those that are compiled
PROGRAM = """
import importlib, json, sys
from chatmill.kernels.gates import cross_compile as gates
cases = [(name.rpartition(".")[2], case) for name in gates.SHIPPED for case in importlib.import_module(name).shipped_cases()]
print(json.dumps([[operation, case.arch] for operation, case in cases]))
sys.exit(gates.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def compiled(pytestconfig: pytest.Config) -> tuple[Counter[tuple[str, int]], Rows]:
    """How many cases ship, and one row per build, of one process without the interpreter: importing torch takes seconds."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), environment.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "--json",
        *(word for arch in generations(pytestconfig) for word in ("--arch", str(arch))),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    cases, rows = (json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == int(any(row["violations"] for row in rows)), done.stderr
    return Counter((operation, arch) for operation, arch in cases), rows


@pytest.fixture(scope="module")
def builds(compiled: tuple[Counter[tuple[str, int]], Rows]) -> Rows:
    return compiled[1]


def of(builds: Rows, operation: str, arch: int = 0, match: str = "") -> Rows:
    return [row for row in builds if row["operation"] == operation and arch in (0, row["arch"]) and match in row["name"]]


def test_every_compiled_build_passes_its_gates(builds: Rows) -> None:
    assert not {f"{row['name']} sm_{row['arch']}": row["violations"] for row in builds if row["violations"]}


@pytest.mark.parametrize(("arch", "attention", "decode"), [(80, 21, 9), (89, 9, 4), (90, 42, 9), (100, 21, 9), (120, 9, 4)])
def test_no_generation_is_left_out(
    compiled: tuple[Counter[tuple[str, int]], Rows], pytestconfig: pytest.Config, arch: int, attention: int, decode: int
) -> None:
    cases, rows = compiled
    assert (cases["attention", arch], cases["decode", arch]) == (attention, decode)
    assert cases["cross_entropy", 80 if arch == 89 else arch if arch in (80, 90) else 100]
    assert sum(n for (operation, _), n in cases.items() if operation == "layer") >= 12
    if arch in generations(pytestconfig):
        assert Counter(row["operation"] for row in rows if row["arch"] == arch) == Counter(
            {operation: n for (operation, of_arch), n in cases.items() if of_arch == arch}
        )


# builds whose third stage does not fit: registers, or the second block of a multiprocessor
UNHIDDEN = ("forward D256 bf16", "dkdv D256 bf16", "dq D128 bf16 short")
# instructions of a step without a mask, per exponential; the soft-cap's have three exponentials a score
STEPS = {
    "forward D64 bf16": 7.0, "forward D128 bf16": 10.5, "forward hopper D64 bf16": 6.7, "forward hopper D128 bf16": 7.3,
    "forward hopper D128 bf16 cap": 4.2,
}  # fmt: skip


def test_a_step_of_attention_costs_what_was_counted(builds: Rows) -> None:
    """Copies are asked for a step ahead; where every pair is seen no mask is computed, and little beside the softmax."""
    rows = of(builds, "attention", 90)
    for row in rows:
        late = [loop for loop in row["loops"] if loop["in_flight"] == 0]
        assert bool(late) == (row["name"] in UNHIDDEN), f"{row['name']}: waits for the copy that it has just asked for"
    for row in rows:
        if row["name"] in STEPS:
            inner = [loop for loop in row["loops"] if loop["selections"] == 0]
            assert len(inner) * 2 == len(row["loops"]), f"{row['name']}: a mask in the steps in which every pair is seen"
            most = max(loop["instructions"] / loop["exponentials"] for loop in inner)
            assert most <= STEPS[row["name"]], f"{row['name']}: {most:.1f} instructions per exponential"


def test_the_hopper_tier_is_really_specialised(builds: Rows) -> None:
    rows = of(builds, "attention", 90, "forward hopper")
    assert len(rows) == 4
    for row in rows:
        assert row["sass"]["USETMAXREG"] > 0
        assert row["sass"]["UTMALDG"] > 0
        assert row["warps"] == 12, "two groups of four warps, and the loader's"
        assert row["loop_spills"] == 0 and row["overlapped"] >= 64


def test_the_fused_backward_loads_and_adds_by_tma(builds: Rows) -> None:
    rows = of(builds, "attention", 90, "hopper fused")
    assert len(rows) == 6
    for row in rows:
        assert row["sass"]["UTMAREDG"] == 1
        assert row["spill_bytes"] == 0
        assert row["sass"]["WARPGROUP.ARRIVE"] == 5, "one wgmma group per product, none split or serialised"


def test_decoding_spills_nothing_and_multiplies_on_tensor_cores_but_for_fp32(builds: Rows, pytestconfig: pytest.Config) -> None:
    stretches = of(builds, "decode", match="stretch")
    assert {row["arch"] for row in stretches} == set(generations(pytestconfig)) and len(stretches) >= 7
    # 16 query rows are one mma tile, too few for a warp group's; fp32 is multiplied without tensor cores
    assert all((row["sass"].get("HMMA", 0) > 0) != row["name"].endswith("fp32") for row in stretches)
    assert all(row["spill_bytes"] == 0 for row in stretches)
