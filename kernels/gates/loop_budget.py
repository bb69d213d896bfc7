"""What a step of a kernel's matrix loop costs, counted in its binary: static analysis, not a timing.

    python -m chatmill.kernels.gates.cross_compile chatmill.kernels.gates.attention --arch 90 --match "hopper D128" --loops

Cycles of one multiprocessor for one step of every warp group of a block, by unit (sm_90: 4 schedulers, each one instruction of
32 lanes per cycle; a warp group is 4 warps, one per scheduler):

    tensor   64 x N x K products at 2,048 a cycle: m64n128k16 takes 64. From 989.4 TFLOP/s dense bf16, 132 SMs, 1.83 GHz (H100
             whitepaper): 4,096 FLOP a cycle
    exp      MUFU, 16 lanes a cycle: 8 cycles an instruction
    half     minimum, maximum, comparison, selection, conversion to 16 bits, integers: 64 lanes a cycle, 2 cycles
    issue    every instruction, 1 cycle
             (CUDA C++ programming guide, throughput of native arithmetic instructions, compute capability 9.0)

`bound` is tensor / the largest of them: the share of the tensor cores' peak with perfect overlap. `serial` is tensor / (tensor
+ the largest of the others): the share if nothing overlaps. Neither includes latencies, waits, clocks or memory.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .matrix_loops import INSTRUCTION, matrix_loops

HALF_RATE = ("FMNMX", "FSEL", "FSETP", "ISETP", "F2FP", "SEL", "LOP3", "IADD3", "VIADD", "IMAD", "SHF", "LEA", "PRMT")


@dataclass(frozen=True)
class LoopBudget:
    """One step of an innermost loop with wgmma, instructions of one warp.

    selections: FSEL, what an element mask is made of. waits: for wgmma. in_flight: fewest groups of copies (cp.async) that a
    wait leaves in flight, -1 without such copies; 0 means that the copy waited for is the latest one.
    """

    instructions: int
    tensor_cycles: int
    exponentials: int
    half_rate: int
    selections: int
    barriers: int
    waits: int
    in_flight: int

    def units(self, groups: int) -> dict[str, int]:
        """Cycles by unit; groups: warp groups that take such a step."""
        mine = {
            "tensor": self.tensor_cycles,
            "exp": 8 * self.exponentials,
            "half": 2 * self.half_rate,
            "issue": self.instructions,
        }
        return {unit: groups * cycles for unit, cycles in mine.items()}

    @property
    def bound(self) -> float:
        return self.tensor_cycles / max(self.units(1).values())

    @property
    def serial(self) -> float:
        return self.tensor_cycles / (self.tensor_cycles + max(n for unit, n in self.units(1).items() if unit != "tensor"))


def loop_budgets(sass: str) -> tuple[LoopBudget, ...]:
    """Of every matrix loop with wgmma, in the binary's order."""
    return tuple(_budget(loop) for loop in matrix_loops(sass) if any("HGMMA" in line for line in loop))


def _budget(loop: list[str]) -> LoopBudget:
    found = [(m[1], m[2]) for line in loop if (m := INSTRUCTION.search(line)) and m[1] != "NOP"]
    first = Counter(name.split(".")[0] for name, _ in found)
    shapes = [re.match(r"HGMMA\.64x(\d+)x(\d+)", name) for name, _ in found]
    left = [int(m[1], 16) for name, rest in found if name == "DEPBAR.LE" and (m := re.match(r"\s*SB0, (0x[0-9a-f]+)", rest))]
    return LoopBudget(
        instructions=len(found),
        tensor_cycles=sum(int(m[1]) * int(m[2]) // 32 for m in shapes if m),
        exponentials=first["MUFU"],
        half_rate=sum(first[name] for name in HALF_RATE),
        selections=first["FSEL"],
        barriers=first["BAR"],
        waits=sum(name.startswith("WARPGROUP.DEPBAR") for name, _ in found),
        in_flight=min(left, default=0) if first["LDGSTS"] else -1,
    )


def describe_loop(loop: LoopBudget, groups: int) -> str:
    """One line of one loop."""
    units = " ".join(f"{unit} {cycles}" for unit, cycles in loop.units(groups).items())
    copies = "" if loop.in_flight < 0 else f", copies left under way {loop.in_flight}"
    return (
        f"    loop: {loop.instructions} instructions, {loop.exponentials} exp, {loop.selections} selections, {loop.barriers} "
        f"barriers, {loop.waits} waits{copies}; cycles {units}; at most {loop.bound:.0%} overlapped, {loop.serial:.0%} serial"
    )
