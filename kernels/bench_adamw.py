"""Benchmark cases of the AdamW step with clipping by the global norm.

    python -m chatmill.kernels.bench adamw

Required work: 32 bytes per parameter (the gradient read for the norm; weight, gradient and moments read, three of them
written). torch's clip_grad_norm_ and fused AdamW move 40, so at the machine's copy rate they show 80 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from chatmill.kernels.adamw import BYTES, adamw_
from chatmill.kernels.bench import BenchCase, Phases

RATE, DECAY, CLIP = 1e-4, 0.1, 1.0


def bench_cases() -> list[BenchCase]:
    """The weights of models with 0.36 and 1.2 billion parameters."""
    return list(_cases())


def _cases() -> Iterator[BenchCase]:
    for name, vocabulary, hidden, width, layers in (("360M", 49152, 960, 2560, 32), ("1.2B", 128256, 2048, 8192, 16)):
        layer = [(hidden,), (hidden,), *[(hidden, hidden)] * 2, *[(hidden // 4, hidden)] * 2, *[(width, hidden)] * 3]
        shapes = [(vocabulary, hidden), *layer * layers, (hidden,)]
        count = sum(int(torch.Size(shape).numel()) for shape in shapes)
        yield BenchCase(
            "adamw",
            f"{name} fp32, clipped",
            {contender: _prepare(make, shapes) for contender, make in CONTENDERS.items()},
            bytes={"step": BYTES["triton"] * count},
        )


def _prepare(
    make: Callable[[list[Tensor], list[Tensor]], Callable[[], object]], shapes: list[tuple[int, ...]]
) -> Callable[[torch.device], Phases]:
    def prepare(device: torch.device) -> Phases:
        weights = [torch.randn(s, device=device) for s in shapes]
        return {"step": make(weights, [torch.randn_like(w) for w in weights])}

    return prepare


def _ours(weights: list[Tensor], gradients: list[Tensor]) -> Callable[[], object]:
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    step, decays = torch.zeros((), device=weights[0].device), [DECAY] * len(weights)
    return lambda: adamw_(weights, gradients, means, squares, step, lr=RATE, weight_decays=decays, max_norm=CLIP)


def _optimizer(
    weights: list[Tensor], gradients: list[Tensor], fused: bool
) -> tuple[list[nn.Parameter], torch.optim.AdamW, Callable[[], object]]:
    parameters = [nn.Parameter(w) for w in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    rate = RATE if fused else torch.tensor(RATE, device=weights[0].device)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=(0.9, 0.95),
        weight_decay=DECAY,
        fused=fused or None,
        capturable=not fused and weights[0].is_cuda,
    )

    def run() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return parameters, optimizer, run


def _torch(weights: list[Tensor], gradients: list[Tensor]) -> Callable[[], object]:
    return _optimizer(weights, gradients, fused=True)[2]


def _compiled(weights: list[Tensor], gradients: list[Tensor]) -> Callable[[], object]:
    return torch.compile(_optimizer(weights, gradients, fused=False)[2])


def _scaled(weights: list[Tensor], gradients: list[Tensor]) -> Callable[[], object]:
    _, optimizer, _ = _optimizer(weights, gradients, fused=True)

    def run() -> None:
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.grad_scale = ((norm + 1e-6) / CLIP).clamp(min=1.0)  # type: ignore[attr-defined]
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        optimizer.step()

    return run


CONTENDERS: dict[str, Callable[[list[Tensor], list[Tensor]], Callable[[], object]]] = {
    "triton": _ours,
    "torch clip+fused": _torch,
    "torch scaled": _scaled,
    "torch.compile": _compiled,
}
