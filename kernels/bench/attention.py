"""Benchmark cases of attention, and the refit of its tile table.

    python -m chatmill.kernels.bench attention [--match packed] [--tune]

Causal FLOPs count the required work: forward 4 x pairs x Hq x D with pairs = sum of n (n + 1) / 2 over documents, backward 2.5
times that (recomputation of P not counted).
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention.flash import FLASH
from ..attention.interface import attention
from ..attention.tile_map import make_tile_map
from ..attention.tiles import TABLE, KernelConfig, TileConfig, tuning_rows
from ..dispatch import capability
from .harness import BenchCase, Phases, median_ms
from .hopper_check import why_unfit


def chat_lengths(T: int, mean: int, seed: int = 0) -> NDArray[np.int64]:
    """cu_seqlens of T tokens of chats: log-normal lengths of the given mean (sigma 0.8), the last one cut."""
    rng = np.random.default_rng(seed)
    bounds = [0]
    while bounds[-1] < T:
        n = int(rng.lognormal(np.log(mean) - 0.32, 0.8)) + 2
        bounds.append(min(T, bounds[-1] + n))
    return np.array(bounds)


def causal_flops(bounds: NDArray[np.int64], heads: int, D: int) -> dict[str, float]:
    """Required work per phase."""
    lengths = np.diff(bounds).astype(np.float64)
    forward = 4.0 * float((lengths * (lengths + 1) / 2).sum()) * heads * D
    return {"forward": forward, "backward": 2.5 * forward, "both": 3.5 * forward}


def _inputs(T: int, heads: int, kv_heads: int, D: int, device: torch.device) -> list[Tensor]:
    shapes = [(T, heads, D), (T, kv_heads, D), (T, kv_heads, D)]
    return [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]


def _phases(run: Callable[[], Tensor], leaves: list[Tensor]) -> Phases:
    out = run()
    dout = torch.randn_like(out)
    return {
        "forward": run,
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        "both": lambda: torch.autograd.grad(run(), leaves, dout),
    }


def _ours(impl: str, bounds: NDArray[np.int64], heads: int, kv_heads: int, D: int) -> Callable[[torch.device], Phases]:
    def prepare(device: torch.device) -> Phases:
        tier, fused = impl.removesuffix(" fused"), impl.endswith(" fused")
        if tier == "hopper" and (reason := why_unfit() or (why_unfit("backward") if fused else None)):
            raise RuntimeError(reason)
        T = int(bounds[-1])
        leaves = _inputs(T, heads, kv_heads, D, device)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device) if len(bounds) > 2 else None
        tile_map = make_tile_map(bounds, T, head_dim=D, device=device, impl=tier).to(device)
        longest = int(np.diff(bounds).max())
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "impl": tier, "tile_map": tile_map, "max_seqlen": longest}
        options |= {"deterministic": tier in OURS and not fused, "complete": True}  # libraries as their users run them
        return _phases(lambda: attention(*leaves, **options), leaves)

    return prepare


def _sdpa(backend: SDPBackend, T: int, heads: int, kv_heads: int, D: int) -> Callable[[torch.device], Phases]:
    def prepare(device: torch.device) -> Phases:
        shapes = [(1, heads, T, D), (1, kv_heads, T, D), (1, kv_heads, T, D)]
        leaves = [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        q, k, v = leaves

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

        return _phases(run, leaves)

    return prepare


# the backward of "hopper" is bitwise reproducible, that of "hopper fused" is not: the difference is the price
OURS = ("triton", "hopper", "hopper fused")


def bench_cases() -> Iterator[BenchCase]:
    """Causal documents of 512 to 32k tokens at D 64 and 128, grouped heads, and packed chats."""
    for D, S in itertools.product((64, 128), (512, 1024, 2048, 4096, 8192, 16384, 32768)):
        heads = 2048 // D
        for kv_heads in (heads, heads // 4) if S == 8192 else (heads,):
            bounds = np.array([0, S])
            contenders = {name: _ours(name, bounds, heads, kv_heads, D) for name in (*OURS, *FLASH, "flex")}
            contenders["sdpa-cudnn"] = _sdpa(SDPBackend.CUDNN_ATTENTION, S, heads, kv_heads, D)
            contenders["sdpa-flash"] = _sdpa(SDPBackend.FLASH_ATTENTION, S, heads, kv_heads, D)
            yield BenchCase(
                "attention", f"causal D{D} S{S} H{heads}/{kv_heads} bf16", contenders, causal_flops(bounds, heads, D)
            )
    for D, (T, mean) in itertools.product((64, 128), ((8192, 100), (8192, 500), (8192, 2000), (32768, 500))):
        heads, bounds = 2048 // D, chat_lengths(T, mean)
        contenders = {name: _ours(name, bounds, heads, heads // 4, D) for name in (*OURS, *FLASH, "sdpa", "flex")}
        name = f"packed D{D} T{T} mean{mean} H{heads}/{heads // 4} bf16"
        yield BenchCase("attention", name, contenders, causal_flops(bounds, heads, D))


# what --tune tries: rows of a query tile, keys of a key tile, warps, stages
TUNED = ("attention",)
CANDIDATES = {
    "forward": [
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 4, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
    ],
    "dkdv": [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 128, 8, 1), (32, 64, 4, 2), (32, 64, 8, 1)],
    "dq": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 64, 8, 1)],
}


def tune(device: torch.device, budget_s: float) -> None:
    """Refit the rows of this GPU's generation in tuning/attention.json: each kernel's tiles, one kernel at a time.

    The table is written after every row, so that an interrupted run keeps its results.
    """
    arch, started = capability(device), time.monotonic()
    table = [dict(row) for row in tuning_rows()]
    for row in table:
        if not row["arch"][0] <= arch <= row["arch"][1] or row["bytes"] != 2:
            continue
        D = row["max_dim"]
        bounds = chat_lengths(16384, 100 if row.get("short") else 2000)
        config = KernelConfig(*(TileConfig(*row[kernel]) for kernel in KernelConfig._fields))
        for kernel in KernelConfig._fields:
            best = _time_config(config, bounds, D, device, kernel)
            for candidate in CANDIDATES[kernel]:
                if time.monotonic() - started > budget_s:
                    print(f"stopped after {budget_s:.0f} s; the rows above are written")
                    return
                trial = config._replace(**{kernel: TileConfig(*candidate)})
                took = _time_config(trial, bounds, D, device, kernel)
                print(
                    f"D{D} {'short' if row.get('short') else 'long'} {kernel} {candidate}: {took:.3f} ms (best {best:.3f})",
                    flush=True,
                )
                if took < best * 0.99:
                    best, config = took, trial
            row[kernel] = list(getattr(config, kernel))
        row["timed"] = time.strftime("%Y-%m-%d") + " " + torch.cuda.get_device_name(device)
        TABLE.write_text("[\n" + ",\n".join("  " + json.dumps(r) for r in table) + "\n]\n")


def _time_config(config: KernelConfig, bounds: NDArray[np.int64], D: int, device: torch.device, kernel: str) -> float:
    """Milliseconds of the phase that a kernel belongs to; infinite where it does not build."""
    T, heads = int(bounds[-1]), 2048 // D
    leaves = _inputs(T, heads, max(1, heads // 4), D, device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    tile_map = make_tile_map(bounds, T, head_dim=D, config=config).to(device)
    try:
        phases = _phases(lambda: attention(*leaves, cu_seqlens=cu_seqlens, tile_map=tile_map, impl="triton"), leaves)
        return median_ms(phases["forward" if kernel == "forward" else "backward"], 20, 60)
    except Exception as error:  # too much shared memory, or a compiler failure: not a candidate here
        print(f"D{D} {kernel} {getattr(config, kernel)}: {type(error).__name__}")
        return float("inf")
