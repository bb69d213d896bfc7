"""Benchmark cases of the linear and the plain cross-entropy.

    python -m chatmill.kernels.bench linear_cross_entropy cross_entropy [--match V128256]

Work counted: 2 x rows with loss x H x V FLOPs forward (loss only), three times that with gradients. Rows without loss are no
required work, so an implementation that computes them shows a lower rate. The harness adds time as a fraction of the
measured matrix-product rate, and peak memory. The plain form is bound by memory: its required work is the logits read once
(forward), and read and overwritten by their gradient once (both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_entropy import tiles as linear_cross_entropy_tiles
from ..cross_entropy.interface import linear_cross_entropy
from ..cross_entropy.logits import cross_entropy
from ..cross_entropy.rows import Products
from ..dispatch import Impl, capability
from .harness import BenchCase, Phases, median_ms

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets, rows -> mean
PlainLoss = Callable[[Tensor, Tensor], Tensor]  # logits, targets -> mean
TUNED = ("linear_cross_entropy",)  # of the kernels here: what tune() refits


def bench_cases() -> Iterator[BenchCase]:
    """Vocabularies 32k to 256k at loss shares of 100, 50 and 20 percent; the published shapes."""
    yield from _cases()
    yield from _plain_cases()


def tune(device: torch.device, budget_s: float) -> None:
    """Refit this GPU generation's tiles and chunk of logits in tuning/linear_cross_entropy.json on the target's shape."""
    phases = _prepare(_ours("triton"), 16384, 2048, 128256, 1.0)(device)

    def measure() -> float:
        try:
            return median_ms(phases["both"], 20, 100)
        except Exception as error:  # too much shared memory, or a compiler failure: not a candidate here
            print(f"{type(error).__name__}: {str(error)[:160]}")
            return float("inf")

    linear_cross_entropy_tiles.tune(measure, capability(device), budget_s, torch.cuda.get_device_name(device))


def _cases() -> Iterator[BenchCase]:
    shapes = [(8192, 2048, V, share) for V in (32000, 49152, 128256, 256000) for share in (1.0, 0.5, 0.2)]
    # the shapes of the published numbers: Liger-Kernel pull request 1356 on an H200
    shapes += [(16384, 2048, 128256, share) for share in (1.0, 0.2)]
    shapes += [(4096, 4096, 128256, 1.0), (16384, 4096, 128256, 1.0), (2048, 2048, 102400, 1.0)]
    for N, H, V, share in shapes:
        forward = 2.0 * round(N * share) * H * V
        yield BenchCase(
            "linear_cross_entropy",
            f"N{N} H{H} V{V} loss {share:.0%} bf16",
            {name: _prepare(loss, N, H, V, share) for name, loss in CONTENDERS.items()},
            flops={"forward": forward, "both": 3 * forward},
        )


def _prepare(loss: Loss, N: int, H: int, V: int, share: float) -> Callable[[torch.device], Phases]:
    def prepare(device: torch.device) -> Phases:
        hidden = torch.randn(N, H, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = (torch.randn(V, H, device=device) / H**0.5).bfloat16().requires_grad_()
        targets = torch.randint(0, V, (N,), device=device)
        keep = torch.randperm(N, device=device)[: round(N * share)].sort().values
        targets = torch.full_like(targets, -100).index_copy(0, keep, targets[keep])
        rows = torch.full((-(-len(keep) // 128) * 128,), -1, device=device, dtype=torch.int64)
        rows[: len(keep)] = keep

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(hidden, weight, targets, rows)

        return {
            "forward": forward,
            "both": lambda: torch.autograd.grad(loss(hidden, weight, targets, rows), (hidden, weight)),
        }

    return prepare


def _plain_cases() -> Iterator[BenchCase]:
    for N, V in ((8192, 32000), (8192, 128256), (4096, 256000)):
        moved = 2.0 * N * V
        yield BenchCase(
            "cross_entropy",
            f"plain N{N} V{V} bf16",
            {name: _prepare_plain(loss, N, V) for name, loss in PLAIN.items()},
            bytes={"forward": moved, "both": 2 * moved},
        )


def _prepare_plain(loss: PlainLoss, N: int, V: int) -> Callable[[torch.device], Phases]:
    def prepare(device: torch.device) -> Phases:
        logits = torch.randn(N, V, device=device, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(0, V, (N,), device=device)

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(logits, targets)

        def both() -> tuple[Tensor, ...]:
            # a detour of its own: the in-place form overwrites what it is given
            return torch.autograd.grad(loss(logits * 1, targets), logits)

        return {"forward": forward, "both": both}

    return prepare


def _ours(impl: Impl, products: Products = "auto") -> Loss:
    return lambda x, w, t, rows: linear_cross_entropy(x, w, t, rows=rows, impl=impl, products=products)


def _eager(x: Tensor, w: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.T).float(), t)


def _torch_fused(x: Tensor, w: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    fused = getattr(F, "linear_cross_entropy", None)  # torch 2.13 and later
    if fused is None:
        raise RuntimeError("torch has no linear_cross_entropy before 2.13")
    out: Tensor = fused(x, w, t, ignore_index=-100)
    return out


def _liger(x: Tensor, w: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    out: Tensor = LigerFusedLinearCrossEntropyLoss()(w, x, t)
    return out


def _cut_cross_entropy(x: Tensor, w: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut  # type: ignore[import-not-found]

    out: Tensor = cut(x, w, t)
    return out


def _quack(x: Tensor, w: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found]

    out: Tensor = chunked_linear_cross_entropy(x, w, t)
    return out


CONTENDERS: dict[str, Loss] = {
    "triton": _ours("triton", "triton"),
    "triton by torch": _ours("triton", "torch"),
    "torch chunked": _ours("torch"),
    "torch eager": _eager,
    "torch.compile": torch.compile(_eager, dynamic=False),
    "torch fused": _torch_fused,
    "liger": _liger,
    "cut": _cut_cross_entropy,
    "quack": _quack,
}


def _plain_eager(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), t)


def _plain_liger(z: Tensor, t: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    out: Tensor = LigerCrossEntropyLoss()(z, t)
    return out


PLAIN: dict[str, PlainLoss] = {
    "triton": lambda z, t: cross_entropy(z, t, impl="triton")[0],
    "triton in place": lambda z, t: cross_entropy(z, t, impl="triton", inplace=z.grad_fn is not None)[0],
    "torch chunked": lambda z, t: cross_entropy(z, t, impl="torch")[0],
    "torch eager": _plain_eager,
    "torch.compile": torch.compile(_plain_eager, dynamic=False),
    "liger": _plain_liger,
}
