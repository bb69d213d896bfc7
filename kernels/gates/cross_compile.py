"""Compile a `@triton.jit` function for a GPU that is not present, and inspect the result.

    report = compile_build(build_case("scale", kernel, {"BLOCK": 128}, arch=90, num_warps=8, num_stages=3))
    report.registers, report.spill_bytes, report.shared_bytes, report.sass["HGMMA"], report.serialized_wgmma

Needs triton, not a GPU: ptxas, cuobjdump and nvdisasm come inside triton's wheel. Must run in a process WITHOUT
TRITON_INTERPRET (interpreted functions have no compiler); the tests therefore run this command in a subprocess, on a module
of this folder that has `shipped_cases()`:

    python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.attention --arch 90 [--match NAME] [--json]

Gates (`violations`): spills within the case's budget, shared memory within the chip's limit, tensor cores really used
(HGMMA on sm_90, and no HMMA where HGMMA is expected), no wgmma serialised by ptxas (warning C7512); and what a case claims
in addition: warp specialisation, instructions, matrix loops without spills, exponentials beside a product. `gluon.jit` works
too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..interpreter import is_interpreting
from .loop_budget import LoopBudget, describe_loop, loop_budgets, matrix_loops

# bytes of shared memory that one block may use (CUDA programming guide, table of compute capabilities)
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# an instruction's whole mnemonic starts with one of these
OPCODES = (
    "HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "LDGSTS", "LDSM", "STSM",
    "LDG.E.128", "STG.E.128", "LDG.E.U16", "STG.E.U16", "LDL", "STL", "USETMAXREG",
    "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "MUFU.EX2",
)  # fmt: skip


@dataclass(frozen=True)
class BuildCase:
    """One configuration that ships: what to compile and what must hold.

    types: triton type per argument that is not constexpr ("*bf16", "fp32", "i32", "i64").
    constants: constexpr arguments. aligned: names of integer arguments known to be multiples of 16.
    spill_bytes: budget of spilled bytes (stores + loads of ptxas -v). tensor_cores: a dot is expected on them.
    specialised: warp specialisation is claimed (setmaxnreg must be there). instructions, forbidden: mnemonics of OPCODES that
    must, or must not, occur.
    clean_loops: nothing may be spilled inside the innermost loops with wgmma. overlapped: exponentials that must occur between
    each wait that leaves a wgmma in flight and the wait that ends it.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    arch: int = 90
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    spill_bytes: int = 0
    tensor_cores: bool = True
    specialised: bool = False
    instructions: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    clean_loops: bool = False
    overlapped: int = 0


# arguments that are no constexpr, by name: pointers that are not of the element type, numbers that are no i32
TYPES = {
    **dict.fromkeys(
        ("LSE", "DLSE", "LSE2", "DELTA", "DQ_SUM", "PART", "TOP", "TOTAL", "COS", "SIN", "SCALE", "PARTIAL"), "*fp32"
    ),
    **dict.fromkeys(("TILE_MAX", "TILE_SUM", "TILE_TOTAL", "OWN", "P_SCALE", "HIT_SCALE", "FLOOR"), "*fp32"),
    **dict.fromkeys(("TILES", "BOUNDS", "LENGTHS"), "*i32"),
    **dict.fromkeys(("eps", "scale", "scale2", "cap2"), "fp32"),
    "LABELS": "*i64",
    "T": "i32",
}
ALIGNED = ("_stride", "_batch", "_row", "_head")
# 16 bytes at a time both ways: a mask or stride that the compiler cannot see through costs up to eight times the accesses
WHOLE_VECTORS: dict[str, Any] = {
    "tensor_cores": False,
    "instructions": ("LDG.E.128", "STG.E.128"),
    "forbidden": ("LDG.E.U16", "STG.E.U16"),
}


def build_case(
    name: str,
    kernel: Any,
    constants: Mapping[str, Any],
    *,
    element: str = "bf16",
    types: Mapping[str, str] | None = None,
    aligned: tuple[str, ...] | None = None,
    **gates: Any,
) -> BuildCase:
    """A case whose types follow from its arguments' names: TYPES, else a pointer to `element` in capitals, else i32.

    types: what differs from that. aligned: by default the width, and names that end as ALIGNED says.
    """
    known = TYPES | dict(types or {})
    names = [n for n in kernel.arg_names if n not in constants]
    kinds = {n: known.get(n, f"*{element}" if n.isupper() else "i32") for n in names}
    if aligned is None:
        aligned = tuple(n for n in names if n == "width" or n.endswith(ALIGNED))
    return BuildCase(name, kernel, kinds, constants, aligned=aligned, **gates)


@dataclass(frozen=True)
class CompileReport:
    """What the compiler made of one case. `sass` counts instructions by mnemonic (those of OPCODES).

    loop_spills: loads and stores of local memory in the innermost loops with wgmma. overlapped: see overlapped_exponentials.
    loops: what a step of each matrix loop costs, loop_budget.py.
    """

    name: str
    arch: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    serialized_wgmma: bool
    wgmma: int
    seconds: float
    sass: dict[str, int]
    loop_spills: int = 0
    overlapped: int = 0
    loops: tuple[LoopBudget, ...] = ()


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def compile_build(case: BuildCase) -> CompileReport:
    """Compile for the case's compute capability (80, 90, 100 ...) and read the binary.

    Pointers are taken as 16-byte aligned, as torch allocates them. Raises what triton raises if it cannot compile.
    """
    if is_interpreting():
        raise RuntimeError("cross-compilation needs a process without TRITON_INTERPRET.")
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, names = case.kernel, list(case.kernel.arg_names)
    given = set(case.types) | set(case.constants)
    if given != set(names):
        missing, foreign = sorted(set(names) - given), sorted(given - set(names))
        raise ValueError(f"{kernel.__name__}: arguments without type or value: {missing}; not its arguments: {foreign}.")
    signature = {n: case.types.get(n, "constexpr") for n in names}
    divisible = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in case.aligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    if getattr(kernel, "is_gluon", bool)():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    else:
        from triton.compiler import ASTSource
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(case.constants), attrs=attributes)
    started = time.perf_counter()
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    return read_binary(built, case.name, case.arch, time.perf_counter() - started)


def read_binary(built: Any, name: str, arch: int, seconds: float) -> CompileReport:
    """Registers, spills, shared memory and instruction counts of a compiled triton kernel."""
    ptx = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx_file = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(built.asm["cubin"])
        ptx_file.write_text(ptx)
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _run(_tool("cuobjdump"), "-res-usage", str(cubin)))
        if usage is None:
            raise RuntimeError(f"{name}: cuobjdump printed no resource usage.")
        sass = _run(_tool("nvdisasm"), "-c", str(cubin))
        found = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
        target = found[1] if found else f"sm_{arch}"
        assembler = "ptxas-blackwell" if arch >= 100 and Path(_tool("ptxas-blackwell")).exists() else "ptxas"
        log = _run(_tool(assembler), f"-arch={target}", "-v", str(ptx_file), "-o", str(Path(folder, "again.cubin")))
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    if "registers" not in log:
        raise RuntimeError(f"{name}: ptxas refused the PTX:\n{log[-2000:]}")
    return CompileReport(
        name=name,
        arch=arch,
        registers=int(usage[1]),
        stack_bytes=int(usage[2]),
        spill_bytes=sum(spills),
        shared_bytes=int(built.metadata.shared),
        warps=int(built.metadata.num_warps),
        serialized_wgmma="C7512" in log or bool(re.search(r"wgmma.*serializ", log)),
        wgmma=ptx.count("wgmma.mma_async"),
        seconds=round(seconds, 2),
        sass={op: count for op in OPCODES if (count := len(re.findall(rf"\b{re.escape(op)}", sass)))},
        loop_spills=loop_spills(sass),
        overlapped=overlapped_exponentials(sass),
        loops=loop_budgets(sass),
    )


def loop_spills(sass: str) -> int:
    """Loads and stores of local memory in the innermost loops with wgmma, which cost time in every step."""
    return sum(len(re.findall(r"\b(?:LDL|STL)\b", "\n".join(loop))) for loop in matrix_loops(sass))


def overlapped_exponentials(sass: str) -> int:
    """Fewest exponentials between a wait that leaves one wgmma in flight and the next wait; 0 if none leaves one."""
    parts = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", sass)[1:]
    return min((len(re.findall(r"MUFU\.EX2", re.split(r"WARPGROUP\.DEPBAR", part)[0])) for part in parts), default=0)


def violations(case: BuildCase, report: CompileReport) -> list[str]:
    """The gates that this build fails, as texts; empty if it may ship."""
    out = []
    if report.spill_bytes > case.spill_bytes:
        out.append(f"spills {report.spill_bytes} bytes, budget {case.spill_bytes}")
    limit = SHARED_LIMIT[case.arch]
    if report.shared_bytes > limit:
        out.append(f"needs {report.shared_bytes} bytes of shared memory, sm_{case.arch} has {limit}")
    if report.serialized_wgmma:
        out.append("ptxas serialised wgmma (C7512)")
    if case.tensor_cores:
        expected = {90: ("HGMMA",), 100: ("UTCHMMA",), 103: ("UTCHMMA",)}.get(case.arch, ("HMMA",))
        if not any(report.sass.get(op) for op in expected):
            out.append(f"no {' or '.join(expected)} instruction: the tensor cores are not used as claimed")
        if case.arch == 90 and report.sass.get("HMMA"):
            out.append(f"{report.sass['HMMA']} HMMA instructions on sm_90: a dot fell back to mma.sync")
    if case.specialised and not report.sass.get("USETMAXREG"):
        out.append("no setmaxnreg: warp specialisation was dropped")
    out += [f"no {op} instruction" for op in case.instructions if not report.sass.get(op)]
    out += [f"{report.sass[op]} {op} instructions, which must not be" for op in case.forbidden if report.sass.get(op)]
    if case.clean_loops and report.loop_spills:
        out.append(f"{report.loop_spills} spilled registers inside the matrix loops")
    if report.overlapped < case.overlapped:
        out.append(f"{report.overlapped} exponentials beside a product under way, {case.overlapped} claimed: they wait for it")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the `shipped_cases()` of a kernel module; exit 1 if a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.kernels.gates.cross_compile", description=__doc__.splitlines()[0])
    parser.add_argument("module", help="module with shipped_cases() -> list[BuildCase]")
    parser.add_argument("--arch", type=int, action="append", help="only these compute capabilities")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--loops", action="store_true", help="what a step of each matrix loop costs, counted, not timed")
    args = parser.parse_args(argv)
    rows, failed = [], 0
    for case in importlib.import_module(args.module).shipped_cases():
        if args.match not in case.name or (args.arch and case.arch not in args.arch):
            continue
        report = None
        try:
            report = compile_build(case)
        except Exception as error:  # the compiler may raise anything; one broken case must not hide the others
            row = {"name": case.name, "arch": case.arch, "violations": [f"{type(error).__name__}: {str(error)[:500]}"]}
        else:
            row = asdict(report) | {"violations": violations(case, report)}
        rows.append(row)
        failed += bool(row["violations"])
        if not args.json:
            print(describe(row), flush=True)
        if args.loops and not args.json and report is not None:
            # a warp-specialised group has its own loops; in other kernels every warp takes the same one
            groups = 2 if case.specialised else max(1, case.num_warps // 4)
            print("".join(describe_loop(loop, groups) + "\n" for loop in report.loops), end="", flush=True)
    if args.json:
        print(json.dumps(rows))
    elif rows:
        print(f"{len(rows)} configurations compiled, {failed} broken. Nothing was run: no claim about speed or results.")
    if not rows:
        print("no case matches", file=sys.stderr)
    return 1 if failed or not rows else 0


def describe(row: Mapping[str, Any]) -> str:
    """One line of a result."""
    if "registers" not in row:
        return f"{row['name']:44} sm_{row['arch']}  FAILED {row['violations']}"
    sass = " ".join(f"{k}={v}" for k, v in row["sass"].items())
    verdict = "ok" if not row["violations"] else f"FAILED {row['violations']}"
    return (
        f"{row['name']:44} sm_{row['arch']:<3} {row['registers']:3} regs {row['spill_bytes']:4} B spilled "
        f"{row['shared_bytes'] / 1024:5.0f} KB {row['warps']:2} warps {row['seconds']:5.1f} s  {sass}  {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
