"""Every shipped configuration launched on a GPU that is not there: what would fail at the first launch on a real one.

    python -m chatmill.kernels.gates.dry_launch [--arch 90] [--match loss] [--quick] [--json] [--triton FOLDER]

The public functions are called, forward and backward (launches.py), on a stand-in for each GPU that ships (fake_gpu.py). What
is reported: whatever dispatch, host code, argument binding or the compiler raise; tensor maps, grids and blocks that the driver
would refuse; too much shared memory; stacks larger than STACK allows; and kernels that were never launched. It says nothing
about results or speed. --quick compiles to Triton's tile IR only: no shared memory, no registers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from ..interpreter import is_interpreting
from .versions import use_triton

ARCHS = (80, 89, 90, 100, 120)
# bytes of stack that builds may have: those of the attention's largest heads and of fp32, which does not use tensor cores
STACK = {"attention_": 2_048, "cross_entropy_": 0, "rms_norm_": 0, "rope_": 0, "swiglu_": 0}


@dataclass(frozen=True)
class Outcome:
    """What became of one case. problems: texts, empty if every launch would have started."""

    arch: int
    name: str
    kernels: tuple[str, ...]
    seconds: float
    problems: tuple[str, ...]


def dry_launches(arch: int, match: str = "", quick: bool = False) -> Iterator[Outcome]:
    """Run the cases whose name has match, a regular expression, one after another, on a stand-in for that capability."""
    from .fake_gpu import fake_gpu
    from .launches import Sizes, launch_cases

    with fake_gpu(arch, quick) as gpu, warnings.catch_warnings():
        # autocast: there is no CUDA; grad: tensors that call themselves cuda tensors
        warnings.simplefilter("ignore")
        for case in launch_cases(arch, Sizes()):
            if not re.search(match, case.name):
                continue
            gpu.launches.clear()
            started, problems = time.perf_counter(), []
            try:
                case.run()
            except Exception as error:  # whatever is raised here would be raised on that GPU; the other cases must be seen too
                problems.append(f"{type(error).__name__}: {str(error)[:600]}")
            if not gpu.launches and not problems:
                problems.append("launched nothing")
            problems += sorted(
                {found for launch in gpu.launches if (found := stack_problem(launch.kernel, launch.stack_bytes))}
            )
            kernels = tuple(launch.kernel for launch in gpu.launches)
            yield Outcome(arch, case.name, kernels, round(time.perf_counter() - started, 2), tuple(problems))


def stack_problem(kernel: str, stack_bytes: int) -> str:
    """What is wrong with a stack of this size, or "" if nothing is."""
    limit = next((limit for prefix, limit in STACK.items() if kernel.startswith(prefix)), 0)
    return f"{kernel} has {stack_bytes} bytes of stack, allowed are {limit}" if stack_bytes > limit else ""


def shipped_kernels(arch: int) -> set[str]:
    """Names of the kernels that some case must launch on this capability."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("chatmill.kernels.")]
    found = {x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    names = {x.fn.__name__ for x in found if x.fn.__name__.endswith("_kernel") and x.fn.__module__.startswith("chatmill.")}
    return {name for name in names if arch == 90 or "hopper" not in name}


def main(argv: Sequence[str] | None = None) -> int:
    """Launch all cases dry; exit 1 if one would fail."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.kernels.gates.dry_launch", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="only these compute capabilities")
    parser.add_argument("--match", default="", help="only cases whose name has this regular expression")
    parser.add_argument("--quick", action="store_true", help="compile to tile IR only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--triton", metavar="FOLDER", help="use the triton installed in this folder")
    args = parser.parse_args(argv)
    if args.triton:
        use_triton(args.triton)
    if is_interpreting():
        parser.error("dry launches compile: unset TRITON_INTERPRET.")
    outcomes: list[Outcome] = []
    for arch in args.arch or ARCHS:
        launched: set[str] = set()
        for outcome in dry_launches(arch, args.match, args.quick):
            outcomes.append(outcome)
            launched |= set(outcome.kernels)
            if not args.json:
                verdict = "ok" if not outcome.problems else f"FAILED {outcome.problems}"
                print(
                    f"sm_{arch:<4} {outcome.name:48} {len(outcome.kernels):3} launches {outcome.seconds:6.1f} s  {verdict}",
                    flush=True,
                )
        if not args.match and (missed := shipped_kernels(arch) - launched):
            problem = f"no case launched {', '.join(sorted(missed))}"
            outcomes.append(Outcome(arch, "every kernel", (), 0.0, (problem,)))
            print(f"sm_{arch:<4} {problem}", file=sys.stderr)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    else:
        launches = sum(len(outcome.kernels) for outcome in outcomes)
        print(f"{len(outcomes)} cases, {launches} launches, {failed} broken. Nothing was run: no claim about results or speed.")
    return 1 if failed or not outcomes else 0


def describe(outcome: Outcome) -> str:
    """One line of a result."""
    verdict = "ok" if not outcome.problems else f"FAILED {outcome.problems}"
    return f"sm_{outcome.arch:<4} {outcome.name:48} {len(outcome.kernels):3} launches {outcome.seconds:6.1f} s  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
