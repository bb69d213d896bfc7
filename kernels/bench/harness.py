"""Benchmarks of the kernels; without a GPU they compile what ships instead.

    python -m chatmill.kernels.bench all                   every kernel (the default)
    python -m chatmill.kernels.bench attention             one
    python -m chatmill.kernels.bench attention --json out.json --plot out.svg
    python -m chatmill.kernels.bench attention --tune      refit the shipped tile table on this GPU (10 minutes at most)
    python -m chatmill.kernels.bench --compile-only        compile every shipped build for sm_80, sm_90, sm_100; time nothing

Each kernel module lists cases (`bench_cases()`); a case names its contenders, each with one callable per phase. Times are
medians of CUDA-event timings after warm-up, on random inputs; a rate is the required work over that time, also given as a
fraction of the machine's matrix-product rate (or copy bandwidth, for cases that count bytes), which is measured first.
Without a GPU the command compiles what ships, says so, and makes no claim about speed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from ..dispatch import is_installed

# kernel -> module with bench_cases(), module with shipped_cases() for cross_compile
REGISTRY = {
    "attention": ("chatmill.kernels.bench.attention", "chatmill.kernels.gates.attention"),
    "decode_attention": ("chatmill.kernels.bench.decode", "chatmill.kernels.gates.decode"),
    "linear_cross_entropy": ("chatmill.kernels.bench.cross_entropy", "chatmill.kernels.gates.cross_entropy"),
    "cross_entropy": ("chatmill.kernels.bench.cross_entropy", "chatmill.kernels.gates.cross_entropy"),
    "rms_norm": ("chatmill.kernels.bench.layer", "chatmill.kernels.gates.layer"),
    "rope": ("chatmill.kernels.bench.layer", "chatmill.kernels.gates.layer"),
    "swiglu": ("chatmill.kernels.bench.layer", "chatmill.kernels.gates.layer"),
}

# phase ("forward", "backward", "both", "step") -> callable that runs it once
Phases = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class BenchCase:
    """One problem. flops or bytes moved per phase: required work, recomputation not counted.

    contenders(device): implementation -> its phases; one that cannot run raises and is listed with the reason.
    """

    kernel: str
    name: str
    contenders: Mapping[str, Callable[[torch.device], Phases]]
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchResult:
    """One timed phase, or the reason why there is no time."""

    kernel: str
    case: str
    contender: str
    phase: str
    ms: float | None = None
    tflops: float | None = None
    gbytes_per_s: float | None = None
    fraction: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None


def median_ms(run: Callable[[], Any], warmup_ms: int = 50, repeat_ms: int = 200) -> float:
    """Median time of one call."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=warmup_ms, rep=repeat_ms, return_mode="median"))


def machine_rates(device: torch.device) -> dict[str, float]:
    """Measured ceilings: bf16 matrix product in FLOP/s, device copy in bytes/s (read plus written)."""
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    return {
        "flops": 2 * n**3 / median_ms(lambda: a @ b) * 1e3,
        "bytes": 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source)) * 1e3,
    }


def run_case(
    case: BenchCase, device: torch.device, rates: Mapping[str, float], only: Sequence[str] | None = None
) -> list[BenchResult]:
    """Time every contender of a case, or those named."""
    results = []
    for name, prepare in case.contenders.items():
        if only is not None and name not in only:
            continue
        try:
            phases = prepare(device)
            for phase, run in phases.items():
                torch.cuda.empty_cache()
                run()
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                run()
                torch.cuda.synchronize(device)
                peak = torch.cuda.max_memory_allocated(device) - before
                ms = median_ms(run)
                flops, moved = case.flops.get(phase), case.bytes.get(phase)
                results.append(
                    BenchResult(
                        case.kernel,
                        case.name,
                        name,
                        phase,
                        ms=ms,
                        tflops=None if flops is None else flops / ms / 1e9,
                        gbytes_per_s=None if moved is None else moved / ms / 1e6,
                        fraction=_fraction(flops, moved, ms, rates),
                        peak_bytes=peak,
                    )
                )
        except Exception as error:  # a missing library or full memory is a row of the table, not the end of it
            results.append(BenchResult(case.kernel, case.name, name, "-", reason=f"{type(error).__name__}: {str(error)[:160]}"))
    return results


def _fraction(flops: float | None, moved: float | None, ms: float, rates: Mapping[str, float]) -> float | None:
    if flops is not None:
        return flops / ms * 1e3 / rates["flops"]
    return None if moved is None else moved / ms * 1e3 / rates["bytes"]


def table(results: Sequence[BenchResult]) -> str:
    """Aligned text, one line per timed phase."""
    lines = [f"{'case':46} {'contender':16} {'phase':9} {'ms':>9} {'TFLOP/s':>8} {'GB/s':>7} {'of peak':>7} {'peak MB':>8}"]
    for r in results:
        if r.ms is None:
            lines.append(f"{r.case:46} {r.contender:16} {r.reason}")
            continue
        tflops = "" if r.tflops is None else f"{r.tflops:.1f}"
        speed = "" if r.gbytes_per_s is None else f"{r.gbytes_per_s:.0f}"
        share = "" if r.fraction is None else f"{r.fraction:.0%}"
        peak = (r.peak_bytes or 0) / 2**20
        lines.append(f"{r.case:46} {r.contender:16} {r.phase:9} {r.ms:9.3f} {tflops:>8} {speed:>7} {share:>7} {peak:8.0f}")
    return "\n".join(lines)


def plot(results: Sequence[BenchResult]) -> str:
    """SVG bars: fraction of the machine's peak, per case and phase, one colour per contender."""
    timed = [r for r in results if r.fraction is not None]
    colours = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569", "#db2777", "#0891b2")
    names = sorted({r.contender for r in timed})
    colour = {name: colours[i % len(colours)] for i, name in enumerate(names)}
    rows, y = [], 40
    for i, name in enumerate(names):
        rows.append(f'<text x="{10 + 130 * i}" y="20" fill="{colour[name]}">{name}</text>')
    previous = ""
    for r in timed:
        label = f"{r.case} {r.phase}"
        if label != previous:
            rows.append(f'<text x="10" y="{y + 12}" fill="#334155">{label}</text>')
            y, previous = y + 18, label
        width = 600 * min(1.2, r.fraction or 0.0)
        rate = f"{r.tflops:.0f} TFLOP/s" if r.tflops is not None else f"{r.gbytes_per_s or 0:.0f} GB/s"
        rows.append(f'<rect x="10" y="{y}" width="{width:.1f}" height="11" fill="{colour[r.contender]}"/>')
        rows.append(f'<text x="{14 + width:.1f}" y="{y + 10}" font-size="10">{rate} ({r.fraction:.0%})</text>')
        y += 14
    body = "\n".join(rows)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{y + 10}" font-family="sans-serif" font-size="12">'
    return f"{head}\n{body}\n</svg>\n"


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date of a measurement."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def compile_only(names: Sequence[str], archs: Sequence[int]) -> int:
    """Cross-compile what ships, in a process without the interpreter; exit status."""
    if not is_installed("triton"):
        print("triton is not installed: nothing to compile, nothing to time on this machine.")
        return 0
    status = 0
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for module in dict.fromkeys(REGISTRY[name][1] for name in names):
        if not is_installed(module):
            continue
        print(f"{module}:", flush=True)
        command = [
            sys.executable,
            "-m",
            "chatmill.kernels.gates.cross_compile",
            module,
            *(w for a in archs for w in ("--arch", str(a))),
        ]
        status |= subprocess.run(command, env=clean, check=False).returncode
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m chatmill.kernels.bench", description="Time the kernels against others.")
    parser.add_argument("kernel", nargs="*", metavar="KERNEL", help=f"{', '.join(REGISTRY)} or all (the default)")
    parser.add_argument("--match", action="append", help="only cases whose name contains this (may be repeated)")
    parser.add_argument("--only", action="append", metavar="CONTENDER", help="only this contender (may be repeated)")
    parser.add_argument("--json", type=Path, help="write results and machine here, after every case")
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    parser.add_argument("--tune", action="store_true", help="refit the tile table on this GPU")
    parser.add_argument("--budget-s", type=float, help="seconds after which nothing new is started (default of --tune: 540)")
    parser.add_argument("--compile-only", action="store_true", help="cross-compile without a GPU; time nothing")
    parser.add_argument("--arch", type=int, action="append", help="compute capabilities of --compile-only (80, 90, 100)")
    args = parser.parse_args(argv)
    if "all" in args.kernel:
        args.kernel = list(REGISTRY)
    unknown = set(args.kernel) - set(REGISTRY)
    if unknown:
        parser.error(f"unknown kernel {', '.join(sorted(unknown))}; choose from {', '.join(REGISTRY)}")
    names = args.kernel or list(REGISTRY)
    if args.compile_only or not torch.cuda.is_available():
        if not torch.cuda.is_available():
            print("No CUDA GPU here: kernels are compiled for sm_80, sm_90 and sm_100, not run and not timed.", flush=True)
        return compile_only(names, args.arch or [])
    device = torch.device("cuda", torch.cuda.current_device())
    if args.tune:
        return _tune(names, device, args.budget_s or 540.0)
    torch._functorch.config.donated_buffer = False  # a compiled backward pass is timed again and again
    began = time.monotonic()
    rates = machine_rates(device)
    about = environment(device) | {"gemm_tflops": rates["flops"] / 1e12, "copy_gbytes_per_s": rates["bytes"] / 1e9}
    print(json.dumps(about), flush=True)
    results: list[BenchResult] = []

    def save() -> None:  # a run that is cut short keeps what it measured
        if args.json:
            args.json.write_text(json.dumps({"machine": about, "results": [asdict(r) for r in results]}, indent=1) + "\n")

    save()
    modules = dict.fromkeys(REGISTRY[name][0] for name in names if is_installed(REGISTRY[name][0]))
    for case in (case for module in modules for case in importlib.import_module(module).bench_cases()):
        if case.kernel not in names or not any(words in case.name for words in args.match or [""]):
            continue
        if args.budget_s and time.monotonic() - began > args.budget_s:
            results.append(BenchResult(case.kernel, case.name, "all", "-", reason=f"the {args.budget_s:.0f} s were used up"))
        else:
            results += run_case(case, device, rates, args.only)
            print(f"{time.monotonic() - began:6.1f} s  {case.name}", flush=True)
        save()
    print(table(results))
    if args.plot:
        args.plot.write_text(plot(results))
    return 0


def _tune(names: Sequence[str], device: torch.device, budget_s: float) -> int:
    tuned = 0
    for name in names:
        module = importlib.import_module(REGISTRY[name][0]) if is_installed(REGISTRY[name][0]) else None
        if module is not None and name in getattr(module, "TUNED", ()):
            module.tune(device, budget_s)
            tuned += 1
    if not tuned:
        print(f"nothing to tune in {', '.join(names)}")
    return 0 if tuned else 1


if __name__ == "__main__":
    sys.exit(main())
