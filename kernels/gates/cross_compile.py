"""Compile a `@triton.jit` function for a GPU that is not present, and inspect the result.

    report = compile_build(build_case("scale", kernel, {"BLOCK": 128}, arch=90, num_warps=8, num_stages=3))
    report.registers, report.spill_bytes, report.shared_bytes, report.sass["HGMMA"], report.serialized_wgmma

Needs triton, not a GPU. Must run in a process WITHOUT TRITON_INTERPRET (interpreted functions have no compiler); the tests
therefore run this command in a subprocess, on modules of this folder that have `shipped_cases()` (all of them by default):

    python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.attention --arch 90 [--match NAME] [--json]
    python -m chatmill.kernels.gates.cross_compile --triton FOLDER      # with the triton installed there (versions.py)

Gates (`violations`): spills within the case's budget, shared memory within the chip's limit, tensor cores really used
(HGMMA on sm_90, and no HMMA where HGMMA is expected), no wgmma serialised by ptxas (warning C7512); and what a case claims
in addition: warp specialisation, instructions, matrix loops without spills, exponentials beside a product. `gluon.jit` works
too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..interpreter import is_interpreting
from .binaries import SHARED_LIMIT, CompileReport, ptxas_log, read_binary, recall, remember
from .loop_budget import describe_loop
from .versions import use_triton

SHIPPED = tuple(f"{__package__}.{name}" for name in ("attention", "decode", "cross_entropy", "layer"))


@dataclass(frozen=True)
class BuildCase:
    """One configuration that ships: what to compile and what must hold.

    types: triton type per argument that is not constexpr ("*bf16", "fp32", "i32", "i64").
    constants: constexpr arguments. aligned: names of integer arguments known to be multiples of 16.
    spill_bytes: budget of spilled bytes (stores + loads of ptxas -v). tensor_cores: a dot is expected on them.
    specialised: warp specialisation is claimed (setmaxnreg must be there). instructions, forbidden: mnemonics of OPCODES that
    must, or must not, occur.
    loop_spills: loads and stores of spilled registers that the innermost loops with matrix products may have. overlapped:
    exponentials that must occur between each wait that leaves a wgmma in flight and the wait that ends it.
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
    loop_spills: int = 0
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


def compile_build(case: BuildCase) -> CompileReport:
    """Compile for the case's compute capability (80, 90, 100 ...) and read the binary.

    Pointers are taken as 16-byte aligned, as torch allocates them. The report is kept beside triton's cache, so that each build
    is compiled and read once, whoever asks. Raises what triton raises if it cannot compile.
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
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    key = repr((triton.__version__, source.hash(), case.arch, sorted(options.items())))
    if (known := recall(key)) is not None:
        return replace(known, name=case.name)
    started = time.perf_counter()
    with ptxas_log() as log:
        built = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    report = read_binary(built, case.name, case.arch, time.perf_counter() - started, log.getvalue())
    remember(key, report)
    return report


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
    if report.loop_spills > case.loop_spills:
        out.append(f"{report.loop_spills} accesses to spilled registers in the matrix loops, budget {case.loop_spills}")
    if report.overlapped < case.overlapped:
        out.append(f"{report.overlapped} exponentials beside a product under way, {case.overlapped} claimed: they wait for it")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the `shipped_cases()` of a kernel module; exit 1 if a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.kernels.gates.cross_compile", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="modules with shipped_cases() -> list[BuildCase]; default: all that ship")
    parser.add_argument("--arch", type=int, action="append", help="only these compute capabilities")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--loops", action="store_true", help="what a step of each matrix loop costs, counted, not timed")
    parser.add_argument("--triton", metavar="FOLDER", help="use the triton installed in this folder")
    args = parser.parse_args(argv)
    if args.triton:
        use_triton(args.triton)
    rows, failed = [], 0
    found = ((name, case) for name in args.modules or SHIPPED for case in importlib.import_module(name).shipped_cases())
    for module, case in found:
        if args.match not in case.name or (args.arch and case.arch not in args.arch):
            continue
        report = None
        try:
            report = compile_build(case)
        except Exception as error:  # the compiler may raise anything; one broken case must not hide the others
            row = {"name": case.name, "arch": case.arch, "violations": [f"{type(error).__name__}: {str(error)[:500]}"]}
        else:
            row = asdict(report) | {"violations": violations(case, report)}
        rows.append(row | {"operation": module.rpartition(".")[2]})
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
        f"({row['loop_spills']} in loops) "
        f"{row['shared_bytes'] / 1024:5.0f} KB {row['warps']:2} warps {row['seconds']:5.1f} s  {sass}  {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
