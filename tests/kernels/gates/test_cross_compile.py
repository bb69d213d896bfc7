"""Cross-compilation reads what the compiler made, and each gate can turn red."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import chatmill.kernels.gates.cross_compile as gates
from chatmill.kernels.gates import binaries
from chatmill.kernels.gates.binaries import CompileReport
from chatmill.kernels.gates.cross_compile import BuildCase, violations
from chatmill.kernels.gates.loop_budget import describe_loop, loop_budgets
from chatmill.kernels.gates.matrix_loops import matrix_loops

GOOD = CompileReport("gemm", 90, 168, 0, 0, 100_000, 4, False, 8, 1.0, {"HGMMA": 8, "USETMAXREG": 3}, overlapped=64)
CASE = BuildCase("gemm", None, {}, {}, arch=90, specialised=True, overlapped=64)
MODULE = """
import triton, triton.language as tl
from chatmill.kernels.gates.cross_compile import build_case

@triton.jit
def gemm_kernel(A, B, C, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, kk = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK):
        acc = tl.dot(tl.load(A + m[:, None] * K + k + kk[None, :]), tl.load(B + n[:, None] * K + k + kk[None, :]).T, acc)
    tl.store(C + m[:, None] * BN + n[None, :], acc.to(tl.bfloat16))

def case(name, arch, bn):
    constants = {"BM": 128, "BN": bn, "BK": 64}
    return build_case(name, gemm_kernel, constants, types={"K": "i32"}, arch=arch, num_warps=4, aligned=("K",))

def shipped_cases():
    return [case("good", 80, 64), case("good", 90, 64), case("good", 100, 64), case("too big", 90, 512)]
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes, budget 0"),
        ({"shared_bytes": 232_449}, "shared memory"),
        ({"serialized_wgmma": True}, "C7512"),
        ({"sass": {"USETMAXREG": 3}}, "no HGMMA"),
        ({"sass": {"HGMMA": 8, "HMMA": 4, "USETMAXREG": 3}}, "fell back to mma.sync"),
        ({"sass": {"HGMMA": 8}}, "warp specialisation was dropped"),
        ({"loop_spills": 2}, "2 accesses to spilled registers in the matrix loops, budget 0"),
        ({"overlapped": 3}, "3 exponentials beside a product under way, 64 claimed"),
    ],
)
def test_each_gate_turns_red(change: dict, words: str) -> None:
    assert violations(CASE, GOOD) == []
    (found,) = violations(CASE, dataclasses.replace(GOOD, **change))
    assert words in found


SASS = """
.L_x_1:
        /*0000*/ LDL R9, [R1] ;
.L_x_2:
        /*0010*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8 ;
        /*0020*/ @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0030*/ HGMMA.64x128x16.F32.BF16 R24 ;
        /*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/ MUFU.EX2 R2, R3 ;
        /*0060*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/ @P0 BRA `(.L_x_2) ;
        /*0080*/ @P1 BRA `(.L_x_1) ;
        /*0090*/ STL [R1], R9 ;
        /*0098*/ EXIT ;
.L_x_4:
        /*00a0*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8 ;
        /*00b0*/ @!P0 BRA `(.L_x_4) ;
        /*00c0*/ BRA `(.L_x_3) ;
"""


def test_spills_count_inside_the_innermost_matrix_loop_alone() -> None:
    assert binaries.loop_spills(SASS) == 0
    assert binaries.loop_spills(SASS.replace("MUFU.EX2 R2, R3", "STL [R1], R2")) == 1


def test_a_loop_whose_jump_back_has_no_condition_is_one_and_the_way_back_from_a_wait_is_none() -> None:
    """As ptxas 13.4 lays them out (triton 3.9): the loop is left in its middle, and its jump back is taken always."""
    turned = SASS.replace("@P0 BRA `(.L_x_2)", "@P0 BRA `(.L_x_5)").replace(
        "/*0080*/ @P1 BRA `(.L_x_1) ;",
        "/*0074*/ STL [R1], R2 ;\n/*0078*/ BRA `(.L_x_2) ;\n.L_x_5:\n/*0080*/ @P1 BRA `(.L_x_1) ;",
    )
    assert binaries.loop_spills(turned) == 1
    (loop,) = matrix_loops(turned)
    assert not any("PHASECHK" in line and "00a0" in line for line in loop), "the second wait lies outside"


@pytest.mark.parametrize("product", ["HMMA.16816.F32.BF16", "UTCHMMA", "QGMMA.64x128x32"])
def test_spills_in_the_matrix_loops_of_every_generation_are_seen(product: str) -> None:
    sass = SASS.replace("HGMMA.64x128x16.F32.BF16", product).replace("MUFU.EX2 R2, R3", "LDL R2, [R1]")
    assert binaries.loop_spills(sass) == 1
    assert loop_budgets(sass) == (), "cycles are known for wgmma alone"


def test_exponentials_count_between_the_wait_that_leaves_a_product_and_the_one_that_ends_it() -> None:
    assert binaries.overlapped_exponentials(SASS) == 1
    late = SASS.replace("        /*0050*/ MUFU.EX2 R2, R3 ;\n", "").replace("@P0 BRA", "MUFU.EX2 R2, R3 ;\n @P0 BRA")
    assert binaries.overlapped_exponentials(late) == 0
    assert binaries.overlapped_exponentials("HMMA") == 0


def test_a_loops_budget_counts_each_unit_and_the_copies_a_wait_leaves_under_way() -> None:
    (bare,) = loop_budgets(SASS)
    assert (bare.instructions, bare.tensor_cycles, bare.exponentials, bare.waits, bare.in_flight) == (7, 64, 1, 2, -1)
    more = "@P1 LDGSTS.E [R1] ;\n /*0051*/ DEPBAR.LE SB0, 0x2 ;\n /*0052*/ FSEL R2, R3 ;\n /*0053*/ BAR.SYNC 0x0 ;\n"
    (loop,) = loop_budgets(SASS.replace("MUFU.EX2 R2, R3 ;\n", more))
    assert (loop.instructions, loop.exponentials, loop.selections, loop.barriers, loop.in_flight) == (10, 0, 1, 1, 2)
    assert loop.units(2) == {"tensor": 128, "exp": 0, "half": 4, "issue": 20}
    assert (loop.bound, loop.serial) == (1.0, 64 / 74)
    assert "at most 100% overlapped" in describe_loop(loop, 2)


def test_a_module_is_compiled_for_three_generations_and_a_bad_tile_is_caught(tmp_path: Path) -> None:
    (tmp_path / "gemm_sample.py").write_text(MODULE)
    source = Path(gates.__file__).resolve().parents[2] / "src"  # found without an installation, too
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(source)])
    command = [sys.executable, "-m", "chatmill.kernels.gates.cross_compile", "gemm_sample", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    rows = {(row["name"], row["arch"]): row for row in json.loads(done.stdout)}
    for arch, opcode in ((80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")):
        row = rows["good", arch]
        assert row["violations"] == []
        assert row["sass"][opcode] > 0
        assert 16 < row["registers"] <= 255
    assert rows["too big", 90]["violations"], "128 x 512 fp32 accumulators do not fit 4 warps"


def test_a_report_without_ptxas_own_words_is_refused() -> None:
    """Nothing was compiled while the log was kept (a cached build, say): spills would read as none."""
    with pytest.raises(RuntimeError, match="no output of ptxas -v"):
        binaries.read_binary(None, "gemm", 90, 1.0, log="")
