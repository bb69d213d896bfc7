"""Time of the host per kernel call, without a GPU: everything runs but the launch itself, on this machine's CPU.

    python -m chatmill.kernels.bench.host_time [--profile FUNCTION] [--json out.json]

A small model is bound by these times on a fast GPU. The shapes are small because none of it depends on them. dispatch counts
Triton as usable on CPU tensors (planning_for_gpu), triton binds and specialises the arguments and compiles for sm_90, and the
launcher does nothing. Times are CPU time of this process in microseconds, the best of several runs; nn.Linear on 8 x 8 tells
how fast the machine is. "before" is the same call through torch's dispatcher and Triton's launch (no eager.py, no launch.py).
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..attention.interface import attention
from ..attention.tile_map import make_tile_map
from ..dispatch import planning_for_gpu
from ..eager import through_dispatcher
from ..launch import launched_by_triton
from ..layer.rms_norm import rms_norm
from ..layer.rope import rope
from ..layer.swiglu import swiglu

# what one decoder layer calls
PER_LAYER = ("rms_norm", "rope", "attention", "rms_norm", "swiglu")
T, HEADS, KV_HEADS, D, H, F = 64, 32, 8, 64, 2048, 8192
ARCH = 90


def silent_driver() -> Any:
    """A triton driver whose launches do nothing; everything before them is triton's own."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    class Utils:
        def load_binary(self, *unused: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 32, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}

    class Driver(GPUDriver):
        def __init__(self) -> None:
            self.utils = Utils()
            self.launcher_cls = lambda source, metadata: lambda *arguments: None
            self.get_device_capability = lambda device=0: divmod(ARCH, 10)
            self.get_current_stream = self.get_current_device = lambda device=0: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", ARCH, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing can be timed here")

    return Driver()


def calls() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Forward and backward of each function of a layer."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16().requires_grad_()

    q, k, v = leaf(T, HEADS, D), leaf(T, KV_HEADS, D), leaf(T, KV_HEADS, D)
    cu_seqlens = torch.tensor([0, 20, T], dtype=torch.int32)
    tile_map = make_tile_map([0, 20, T], T, head_dim=D, device=q.device, impl="triton")
    x, weight, residual = leaf(T, H), leaf(H), leaf(T, H)
    cos, gate, up = torch.randn(T, D // 2), leaf(T, F), leaf(T, F)
    packed: dict[str, Any] = {"cu_seqlens": cu_seqlens, "tile_map": tile_map, "complete": True}
    runs: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...]]] = {
        "attention": (lambda: attention(q, k, v, impl="triton", **packed), (q, k, v)),
        "rms_norm": (lambda: rms_norm(x, weight, 1e-6, residual, impl="triton"), (x, weight, residual)),
        "rope": (lambda: rope(q, k, cos, cos, impl="triton"), (q, k)),
        "swiglu": (lambda: swiglu(gate, up, impl="triton"), (gate, up)),
    }

    def outputs(run: Callable[[], Any]) -> tuple[Tensor, ...]:
        out = run()
        return out if isinstance(out, tuple) else (out,)

    def pair(names: Sequence[str]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        parts = [runs[name] for name in names]
        leaves = [leaf for _, its in parts for leaf in its]
        upstream = [torch.randn_like(out) for run, _ in parts for out in outputs(run)]

        def forward() -> Tensor:
            return Sink.apply(upstream, *(out for run, _ in parts for out in outputs(run)))

        loss = forward()
        return forward, lambda: torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)

    return {name: pair([name]) for name in runs} | {"a layer": pair(PER_LAYER)}


class Sink(torch.autograd.Function):
    """One scalar of many tensors, whose backward hands out gradients that are there: the engine is entered once for all."""

    @staticmethod
    def forward(ctx, upstream, *inputs):  # type: ignore[no-untyped-def]
        ctx.upstream = upstream
        return torch.zeros(())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, *ctx.upstream


def best_us(run: Callable[[], Any], times: int = 40, repeats: int = 20) -> dict[str, float]:
    """Microseconds of one call, now and as it was before: the best of some repeats that take turns."""
    best = {"direct": float("inf"), "before": float("inf")}
    for i in range(2 * repeats):
        way = ("direct", "before")[i % 2]
        with contextlib.ExitStack() as stack:
            if way == "before":
                stack.enter_context(through_dispatcher())
                stack.enter_context(launched_by_triton())
            run()
            began = time.process_time()
            for _ in range(times):
                run()
            best[way] = min(best[way], (time.process_time() - began) / times * 1e6)
    return best


def measure(profile: str | None = None) -> dict[str, dict[str, float]]:
    """Microseconds of each function and of all that a layer calls, now and as it was before."""
    import triton

    linear, small = torch.nn.Linear(8, 8, bias=False), torch.randn(8, 8, requires_grad=True)
    found = {"nn.Linear 8x8 forward": best_us(lambda: linear(small))}
    triton.runtime.driver.set_active(silent_driver())
    with planning_for_gpu(), mock.patch("triton.compiler.compiler.max_shared_mem", lambda device: 232_448):
        for name, (forward, backward) in calls().items():
            for phase, run in (("forward", forward), ("backward", backward)):
                found[f"{name} {phase}"] = best_us(run)
                if profile == name:
                    _print_profile(f"{name} {phase}", run)
    return found


def _print_profile(title: str, run: Callable[[], Any]) -> None:
    print(title)
    with cProfile.Profile() as profiler:
        for _ in range(500):
            run()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=sorted({*PER_LAYER, "a layer"}), help="show where the time of one function goes")
    parser.add_argument("--json", type=Path, help="write the times here")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels have no launch. Unset it.")
    torch.set_num_threads(1)
    found = measure(options.profile)
    for name, ways in found.items():
        ratio = f"ratio {ways['direct'] / ways['before']:.2f}"
        print(f"{name:<28}" + "".join(f"{way} {took:6.0f} us   " for way, took in ways.items()) + ratio)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
