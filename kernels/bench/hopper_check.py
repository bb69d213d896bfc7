"""Checks that the Hopper tier is right on this GPU and does not hang. Each runs in its own process: a deadlock costs seconds.

    python -m chatmill.kernels.bench.hopper_check [NAME ...] [--timeout-s 60] [--verdict FILE]

A kernel with a barrier error does not fail: it waits for ever and takes the process with it. The benchmark and the GPU tests
therefore ask `why_unfit()` or `guarded(name)` first. Without a Hopper GPU the command says so and ends 0.

--verdict writes what was found; where CHATMILL_HOPPER_VERDICT names that file, why_unfit() reads it and starts nothing. So many
processes ask once, and a check that hangs is not repeated by each of them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.interface import attention, attention_with_lse
from ..attention.operators import attention_backward
from ..attention.reference import attention_reference
from ..attention.tile_map import make_tile_map
from ..dispatch import capability

# norm of the error over the norm of the result, forward, for inputs of each type
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 8e-4}
LAYOUTS: dict[str, tuple[Sequence[int], int, dict[str, Any]]] = {
    "one token": ([0, 1], 1, {}),
    "one document": ([0, 1531], 1531, {}),
    "window": ([0, 1531], 1531, {"window": 300}),
    "hundreds of short documents": ([*range(0, 1400, 7), 1531], 1531, {}),
    "mixed, rows of none": ([0, 5, 9, 400, 400, 640, 1300], 1531, {}),
    "mixed, window": ([0, 5, 9, 400, 400, 640, 1300], 1531, {"window": 77}),
    "both directions": ([0, 20, 700], 700, {"causal": False}),
    "soft-cap": ([0, 20, 700], 700, {"softcap": 5.0}),
}


def _inputs(T: int, heads: int, kv_heads: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(T, h, D, device="cuda", dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def compare(
    bounds: Sequence[int], T: int, D: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, **rules: Any
) -> float:
    """Relative error of the output; AssertionError where it or the log-sum-exp is wrong."""
    qkv, cu_seqlens = _inputs(T, heads, kv_heads, D, dtype), torch.tensor(bounds, dtype=torch.int32, device="cuda")
    out, lse = attention_with_lse(*qkv, cu_seqlens=cu_seqlens, impl="hopper", **rules)
    expected, expected_lse = attention_reference(*(x.double() for x in qkv), cu_seqlens=cu_seqlens, **rules)
    error = float((out.double() - expected).norm() / expected.norm())
    assert error < TOLERANCE[dtype], f"error {error:.2e}, at most {TOLERANCE[dtype]:.0e}"
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    return error


def one_tile() -> dict[str, float]:
    """The least work: one tile, one head, two steps."""
    return {f"D{D}": compare([0, 256], 256, D, torch.bfloat16, 1, 1) for D in (64, 128)}


def layouts() -> dict[str, float]:
    """Every layout in both types and head dimensions."""
    return {
        f"{name} D{D} {str(dtype)[6:]}": compare(bounds, T, D, dtype, **rules)
        for name, (bounds, T, rules) in LAYOUTS.items()
        for D in (64, 128)
        for dtype in TOLERANCE
    }


def backward() -> dict[str, float]:
    """Gradients of the fused backward, whose forward is the reference, in every layout; how far two of its runs differ."""
    found = {}
    for (name, (bounds, T, rules)), D in itertools.product(LAYOUTS.items(), (64, 128)):
        if rules.get("softcap") and D > 64:
            continue
        qkv, cu_seqlens = _inputs(T, 4, 2, D, torch.bfloat16), torch.tensor(bounds, dtype=torch.int32, device="cuda")
        dout, wide = torch.randn_like(qkv[0]), [x.double().requires_grad_() for x in qkv]
        out, lse = attention_reference(*wide, cu_seqlens=cu_seqlens, **rules)
        expected = torch.autograd.grad((out * dout).sum(), wide)
        causal, window, softcap = rules.get("causal", True), rules.get("window", 0), rules.get("softcap", 0.0)
        options = (None, cu_seqlens, None, (), causal, window, softcap, D**-0.5, "hopper-fused")
        given = (*qkv, out.detach().to(qkv[0].dtype), lse.detach().float(), dout)
        grads, again = (attention_backward(*given, *options) for _ in range(2))
        for which, mine, other, true in zip(("dq", "dk", "dv"), grads, again, expected, strict=True):
            # one token: dq and dk are zero but for rounding
            error = float((mine.double() - true).norm() / true.norm().clamp_min(1e-2 * expected[2].norm()))
            assert error < 1.2e-2, f"{name}, D = {D}, {which}: error {error:.2e}"
            assert float((mine - other).norm()) <= 5e-3 * float(mine.norm()) + 1e-6, f"{name}, D = {D}, {which}: runs differ"
            found[f"{name} D{D} {which}"] = error
    return found


def bitwise() -> dict[str, float]:
    """Fifty runs of one call are equal; a race would show here first."""
    q, k, v = _inputs(8192, 16, 4, 128, torch.bfloat16)
    bounds = torch.tensor([0, 3000, 3100, 8192], dtype=torch.int32, device="cuda")
    first = attention(q, k, v, cu_seqlens=bounds, impl="hopper")
    differing = sum(not torch.equal(first, attention(q, k, v, cu_seqlens=bounds, impl="hopper")) for _ in range(50))
    assert not differing, f"{differing} of 50 runs differ"
    return {"differing": float(differing)}


def long_row() -> dict[str, float]:
    """Elements past 2**31."""
    T = (1 << 31) // (16 * 128) + 130
    q = torch.randn(T, 16, 128, device="cuda", dtype=torch.bfloat16)
    bounds = torch.tensor([0, T - 100, T], dtype=torch.int32, device="cuda")
    out = attention(q, q[:, :1], q[:, :1], cu_seqlens=bounds, window=64, impl="hopper")
    expected, _ = attention_reference(q[-100:].double(), q[-100:, :1].double(), q[-100:, :1].double(), window=64)
    error = float((out[-100:].double() - expected).norm() / expected.norm())
    assert error < TOLERANCE[q.dtype], f"error {error:.2e}"
    return {"error": error}


def speed() -> dict[str, float]:
    """TFLOP/s of the causal forward, for a first impression; the benchmark is what counts."""
    from .harness import median_ms

    found = {}
    for D in (64, 128):
        for S in (4096, 8192, 16384):
            heads = 2048 // D
            q, k, v = _inputs(S, heads, heads, D, torch.bfloat16)
            tile_map = make_tile_map([0, S], S, head_dim=D, device=q.device, impl="hopper").to(q.device)
            run = functools.partial(attention, q, k, v, tile_map=tile_map, impl="hopper")
            found[f"D{D} S{S} TFLOP/s"] = 2.0 * S * (S + 1) * heads * D / median_ms(run, 20, 60) / 1e9
    return found


CHECKS: dict[str, Callable[[], dict[str, float]]] = {
    "one_tile": one_tile, "layouts": layouts, "backward": backward, "bitwise": bitwise, "long_row": long_row, "speed": speed,
}  # fmt: skip


VERDICT = "CHATMILL_HOPPER_VERDICT"
TIMEOUT_S = 60.0  # less than a test has (CHATMILL_TEST_LIMIT_S of make gpu): the test must outlive the check


def guarded(name: str, timeout_s: float = TIMEOUT_S) -> dict[str, float]:
    """Figures of one check, made in another process; RuntimeError where it fails or does not end."""
    command = [sys.executable, "-m", "chatmill.kernels.bench.hopper_check", "--here", name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"attention, Hopper tier: {name} did not end within {timeout_s:.0f} s: a deadlock of its barriers, or a compiler "
            "that hangs. Do not set impl=hopper on this machine."
        ) from None
    if done.returncode:
        raise RuntimeError(f"attention, Hopper tier: {name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@functools.cache
def why_unfit(check: str = "one_tile") -> str | None:
    """Reason not to run the Hopper tier in this process, found in another one; None where it works.

    "one_tile" for the forward, "backward" for the fused backward.
    """
    if path := os.environ.get(VERDICT):
        try:
            told: dict[str, str | None] = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"attention, Hopper tier: no verdict in {path} ({type(error).__name__}), so it is not run."
        return told.get(check, f"attention, Hopper tier: {check} is not in {path}, so it is not run.")
    try:
        guarded(check)
    except RuntimeError as error:
        return str(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run checks; exit 1 where one fails or hangs."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.kernels.bench.hopper_check", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CHECKS))
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="per check")
    parser.add_argument("--verdict", type=Path, help="write per check null, or why the tier must not run")
    parser.add_argument("--here", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = sorted(set(options.names) - set(CHECKS))
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)}; choose from {', '.join(CHECKS)}")
    verdict: dict[str, str | None] = dict.fromkeys(options.names or CHECKS, "attention, Hopper tier: its check did not end.")
    if not torch.cuda.is_available() or not 90 <= capability(torch.device("cuda", 0)) < 100:
        print("no Hopper GPU here: nothing was run.")
        _write(options.verdict, dict.fromkeys(verdict, "no Hopper GPU"))
        return 0
    if options.here:
        print(json.dumps(CHECKS[options.here]()))
        return 0
    _write(options.verdict, verdict)
    failed = 0
    for name in options.names or CHECKS:
        try:
            print(f"{name}: ok {json.dumps(guarded(name, options.timeout_s))}", flush=True)
            verdict[name] = None
            _write(options.verdict, verdict)
        except RuntimeError as error:
            failed += 1
            verdict[name] = str(error)
            _write(options.verdict, verdict)
            print(error, flush=True)
            if "did not end" in str(error):
                break
    return int(failed > 0)


def _write(path: Path | None, verdict: Mapping[str, str | None]) -> None:
    if path is not None:
        path.write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
