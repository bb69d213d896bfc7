"""The shipped configurations executed on a CPU from Triton's own IR: accesses outside of tensors, and races between programs.

    python -m chatmill.kernels.gates.memory_check [--arch 90] [--match loss] [--memory-gb 12] [--ttsem FOLDER] [--json]
    python -m chatmill.kernels.gates.memory_check --tests tests/kernels/layer/test_rms_norm.py -k residual

The calls are those of the dry launches (launches.py) with the tiles that ship, on sizes of several tiles and no multiple of
one. ttsem 0.1 (PyPI, MIT) compiles every launch to TTIR and executes it. It reports an access outside of the tensors that were
passed, an operation without a defined result, and two programs of which one writes what the other touches, each at the kernel's
line; memory that torch.empty returns holds NaN. --tests runs test files in the same way, as if there were a GPU.

Cases that ttsem cannot execute are named in UNKNOWN, with what is missing. Any other that it cannot execute is a failure,
and so does a launch with too many accesses for the search for races. docs/kernels-correctness.md says what this does not prove.
ttsem asks for Python 3.12 and runs on 3.11 as well: there pip needs --ignore-requires-python, as installed_ttsem passes it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from ..interpreter import is_interpreting
from .versions import installed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TTSEM = "0.1.0"
# cases that ttsem 0.1 cannot execute, by the first word of their names
UNKNOWN = {
    "hopper": "Gluon kernels have no TTIR; an addition through a tensor map is executed as a store, and reported as a race"
}


@dataclass(frozen=True)
class Verdict:
    """What became of one case. status: "ok", "unknown" (UNKNOWN names it) or "failed"; text: why."""

    name: str
    status: str
    launches: int
    seconds: float
    text: str = ""


def installed_ttsem(cache: Path) -> Path:
    """A folder with ttsem, installed without dependencies if it is missing: it needs numpy, torch, triton."""
    return installed("ttsem", TTSEM, cache, "--ignore-requires-python")


def checked(arch: int, match: str = "") -> Iterator[Verdict]:
    """Execute the cases whose name has match, a regular expression."""
    from ttsem import sanitize

    from .launches import Sizes, launch_cases

    sizes = Sizes(
        tokens=160, heads=(2, 1), loss_rows=150, loss_width=80, words=300, chunk_rows=70, layer_rows=40, cached=150
    )  # fmt: skip
    with sanitize.session(arch) as state, _wide_products(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in launch_cases(arch, sizes):
            if not re.search(match, case.name):
                continue
            if (gap := UNKNOWN.get(case.name.split()[0])) is not None:
                yield Verdict(case.name, "unknown", 0, 0.0, gap)
                continue
            started, before, unsearched = time.process_time(), state.launches, state.races_unchecked
            status, text = "ok", ""
            try:
                case.run()
            except Exception as fault:  # of the kernel, of the host code, or something that ttsem does not know
                status, text = "failed", f"{type(fault).__name__}: {fault}"
            if status == "ok" and state.races_unchecked > unsearched:
                status, text = "failed", "more accesses than are searched for races: make the case smaller"
            if status == "ok" and state.launches == before:
                status, text = "failed", "launched nothing"
            yield Verdict(case.name, status, state.launches - before, round(time.process_time() - started, 1), text[:800])


@contextlib.contextmanager
def _wide_products() -> Iterator[None]:
    """torch.mm and torch.addmm with out_dtype, which torch has for CUDA alone, on the CPU tensors that stand for CUDA ones."""
    import torch

    plain, plain_add = torch.mm, torch.addmm

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return plain(a, b, **options) if out_dtype is None else plain(a.to(out_dtype), b.to(out_dtype), **options)

    def addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if out_dtype is not None:
            a, b = a.to(out_dtype), b.to(out_dtype)
        return plain_add(total, a, b, **options)

    with mock.patch.object(torch, "mm", mm), mock.patch.object(torch, "addmm", addmm):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Execute all cases, or tests; exit 1 if one fails, 2 if ttsem is missing."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.kernels.gates.memory_check", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="whose tiles are executed")
    parser.add_argument("--match", default="", help="only cases whose name has this regular expression")
    parser.add_argument("--memory-gb", type=float, default=12, help="address space that this process may take")
    parser.add_argument("--ttsem", metavar="FOLDER", help="use the ttsem installed in this folder")
    parser.add_argument(
        "--install", metavar="FOLDER", type=Path, help="use ttsem below this folder, installed if it is missing"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="run pytest with these arguments instead")
    args = parser.parse_args(argv)
    if is_interpreting():
        parser.error("what is executed is compiled first: unset TRITON_INTERPRET.")
    if args.install:
        args.ttsem = str(installed_ttsem(args.install))
    if args.ttsem:
        sys.path.insert(0, args.ttsem)
    try:
        from ttsem import sanitize
    except ModuleNotFoundError as missing:
        print(f"{missing}. Install it with --install FOLDER.", file=sys.stderr)
        return 2
    limit = int(args.memory_gb * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if args.tests:
        return int(sanitize.run_pytest(args.tests, args.arch))
    verdicts = []
    for verdict in checked(args.arch, args.match):
        verdicts.append(verdict)
        if not args.json:
            print(describe(verdict), flush=True)
    failed = sum(verdict.status == "failed" for verdict in verdicts)
    if args.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts]))
    else:
        unknown = sum(verdict.status == "unknown" for verdict in verdicts)
        print(f"{len(verdicts)} cases, {failed} failed, {unknown} that ttsem cannot execute.")
    return 1 if failed or not verdicts else 0


def describe(verdict: Verdict) -> str:
    """One line of a result."""
    return f"{verdict.name:48} {verdict.launches:3} launches {verdict.seconds:6.1f} s  {verdict.status} {verdict.text}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
