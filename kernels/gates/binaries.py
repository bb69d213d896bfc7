"""What the compiler made of a kernel: registers, spills, shared memory and instructions, read from its binary.

    with ptxas_log() as log:
        built = triton.compile(...)
    report = read_binary(built, "scale", 90, seconds=1.0, log=log.getvalue())
    report.registers, report.spill_bytes, report.shared_bytes, report.sass["HGMMA"], report.serialized_wgmma

Needs triton, not a GPU: cuobjdump and nvdisasm come inside triton's wheel, and triton's own run of ptxas says what was spilled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import loop_budget, matrix_loops
from .loop_budget import LoopBudget, loop_budgets

# bytes of shared memory that one block may use (CUDA programming guide, table of compute capabilities)
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# an instruction's whole mnemonic starts with one of these
OPCODES = (
    "HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "LDGSTS", "LDSM", "STSM",
    "LDG.E.128", "STG.E.128", "LDG.E.U16", "STG.E.U16", "LDL", "STL", "USETMAXREG",
    "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "MUFU.EX2",
)  # fmt: skip


@dataclass(frozen=True)
class CompileReport:
    """What the compiler made of one case. `sass` counts instructions by mnemonic (those of OPCODES).

    loop_spills: loads and stores of local memory in the innermost loops with matrix products. overlapped: see
    overlapped_exponentials. loops: what a step of each matrix loop costs, loop_budget.py.
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


def tool(name: str) -> str:
    """Path of a program inside triton's wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@contextlib.contextmanager
def ptxas_log() -> Iterator[io.StringIO]:
    """Everything compiled inside is compiled anew, and what triton's own `ptxas -v` says about it is collected."""
    from triton import knobs

    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True  # triton prints it
        yield log


def read_binary(built: Any, name: str, arch: int, seconds: float, log: str) -> CompileReport:
    """Registers, spills, shared memory and instruction counts of a compiled triton kernel.

    log: what ptxas_log collected while it was compiled.
    """
    if "registers" not in log:
        raise RuntimeError(f"{name}: no output of ptxas -v was seen while this was compiled; got {log[-2000:]!r}.")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(built.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _run(tool("cuobjdump"), "-res-usage", str(cubin)))
        if usage is None:
            raise RuntimeError(f"{name}: cuobjdump printed no resource usage.")
        sass = _run(tool("nvdisasm"), "-c", str(cubin))
    return CompileReport(
        name=name,
        arch=arch,
        registers=int(usage[1]),
        stack_bytes=int(usage[2]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        shared_bytes=int(built.metadata.shared),
        warps=int(built.metadata.num_warps),
        serialized_wgmma="C7512" in log or bool(re.search(r"wgmma.*serializ", log)),
        wgmma=built.asm["ptx"].count("wgmma.mma_async"),
        seconds=round(seconds, 2),
        sass={op: count for op in OPCODES if (count := len(re.findall(rf"\b{re.escape(op)}", sass)))},
        loop_spills=loop_spills(sass),
        overlapped=overlapped_exponentials(sass),
        loops=loop_budgets(sass),
    )


def recall(key: str) -> CompileReport | None:
    """A report that remember() kept under this key beside triton's own cache, or None."""
    from triton.runtime.cache import get_cache_manager

    path = get_cache_manager(_hash(key)).get_file(REPORT_FILE)
    if path is None:
        return None
    row = json.loads(Path(path).read_text(encoding="utf-8"))
    return CompileReport(**(row | {"loops": tuple(LoopBudget(**loop) for loop in row["loops"])}))


def remember(key: str, report: CompileReport) -> None:
    """Keep a report for the next process that asks with this key."""
    from triton.runtime.cache import get_cache_manager

    get_cache_manager(_hash(key)).put(json.dumps(asdict(report)), REPORT_FILE, binary=False)


REPORT_FILE = "chatmill_report.json"


def _hash(key: str) -> str:
    """Of the key and of this code: a report read in another way is another report."""
    code = [Path(path).read_bytes() for path in (__file__, loop_budget.__file__, matrix_loops.__file__)]
    return hashlib.sha256(b"\0".join([key.encode(), *code])).hexdigest()


def loop_spills(sass: str) -> int:
    """Loads and stores of local memory in the innermost loops with matrix products, which cost time in every step."""
    return sum(len(re.findall(r"\b(?:LDL|STL)\b", "\n".join(loop))) for loop in matrix_loops.matrix_loops(sass))


def overlapped_exponentials(sass: str) -> int:
    """Fewest exponentials between a wait that leaves one wgmma in flight and the next wait; 0 if none leaves one."""
    parts = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", sass)[1:]
    return min((len(re.findall(r"MUFU\.EX2", re.split(r"WARPGROUP\.DEPBAR", part)[0])) for part in parts), default=0)
