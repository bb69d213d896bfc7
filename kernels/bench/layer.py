"""Benchmark cases of RMSNorm, rotary positions and SwiGLU, which move bytes and do little else.

    python -m chatmill.kernels.bench rms_norm rope swiglu

Bytes counted: each input read once, each output written once. A kernel stays in the library only if it beats
torch.compile here (docs/log.md records the decisions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer.rms_norm import rms_norm
from ..layer.rope import rope, rope_reference
from ..layer.swiglu import swiglu
from .harness import BenchCase, Phases

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def bench_cases() -> Iterator[BenchCase]:
    """8192 and 16384 tokens at the widths of models from 135M to 8B, bf16."""
    others: dict[str, Operation] = {"liger": _liger_norm, "quack": _quack_norm}
    for T, H in ((16384, 576), (16384, 2048), (8192, 4096)):
        x, name = T * H * 2, f"T{T} H{H}"
        yield _case("rms_norm", name, lambda x, w: rms_norm(x, w, impl="triton"), _norm, [(T, H), (H,)], 2 * x, 3 * x, others)
        ours, both = _norm_of_sum_by_triton, [(T, H), (T, H), (H,)]
        yield _case("rms_norm", f"{name} residual", ours, _norm_of_sum, both, 4 * x, 4 * x)
    for T, width in ((16384, 1536), (16384, 8192), (8192, 14336)):
        y, name, others = T * width * 2, f"T{T} F{width}", {"liger": _liger_swiglu}
        shapes = [(T, width), (T, width)]
        yield _case("swiglu", name, lambda g, u: swiglu(g, u, impl="triton"), _gated, shapes, 3 * y, 5 * y, others)
    for T, heads, kv_heads, D in ((16384, 32, 8, 64), (8192, 32, 8, 128)):
        moved = T * (heads + kv_heads) * D * 2 * 2
        for norm in (False, True):
            turned = [(T, heads, D), (T, kv_heads, D), *([(D,), (D,)] if norm else [])]
            name, backward = f"T{T} H{heads}/{kv_heads} D{D}{' QK-norm' if norm else ''}", moved * 3 // 2 if norm else moved
            yield _case("rope", name, _turn("triton"), _turn("reference"), turned, moved, backward)


def _case(
    kernel: str,
    name: str,
    ours: Operation,
    plain: Operation,
    shapes: Sequence[tuple[int, ...]],
    forward: int,
    backward: int,
    others: Mapping[str, Operation] | None = None,
) -> BenchCase:
    """Ours against plain torch, the same compiled, and others. forward, backward: bytes that must be moved."""
    runs = {"triton": ours, "torch": plain, "torch.compile": torch.compile(plain, dynamic=False), **(others or {})}
    return BenchCase(kernel, f"{name} bf16", _contenders(runs, shapes), bytes={"forward": forward, "backward": backward})


def _contenders(
    runs: Mapping[str, Operation], shapes: Sequence[tuple[int, ...]]
) -> dict[str, Callable[[torch.device], Phases]]:
    def prepare_with(run: Operation) -> Callable[[torch.device], Phases]:
        def prepare(device: torch.device) -> Phases:
            leaves = [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
            made = run(*leaves)
            outs = made if isinstance(made, tuple) else (made,)
            upstream = [torch.randn_like(o) for o in outs]
            return {
                "forward": lambda: run(*leaves),
                "backward": lambda: torch.autograd.grad(outs, leaves, upstream, retain_graph=True),
            }

        return prepare

    return {name: prepare_with(run) for name, run in runs.items()}


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, 1e-6)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _norm_of_sum(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return F.rms_norm(h, w.shape, w, 1e-6), h


def _norm_of_sum_by_triton(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(x, w, residual=r, impl="triton")


def _turn(impl: str) -> Operation:
    tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def run(q: Tensor, k: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T, half = q.shape[0], q.shape[2] // 2
        if (T, half) not in tables:
            angles = torch.arange(T, device=q.device)[:, None] * 1e4 ** (-torch.arange(half, device=q.device) / half)
            tables[T, half] = angles.cos(), angles.sin()
        cos, sin = tables[T, half]
        if impl == "triton":
            return rope(q, k, cos, sin, q_norm=q_norm, k_norm=k_norm, impl="triton")
        if q_norm is not None and k_norm is not None:
            q, k = F.rms_norm(q, q_norm.shape, q_norm, 1e-6), F.rms_norm(k, k_norm.shape, k_norm, 1e-6)
        return rope_reference(q, k, cos, sin)

    return run


def _liger_norm(x: Tensor, w: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found]

    out: Tensor = LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
    return out


def _quack_norm(x: Tensor, w: Tensor) -> Tensor:
    from quack import rmsnorm  # type: ignore[import-not-found]

    out: Tensor = rmsnorm(x, w, eps=1e-6)
    return out


def _liger_swiglu(g: Tensor, u: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    out: Tensor = LigerSiLUMulFunction.apply(g, u)
    return out
