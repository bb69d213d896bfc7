"""Linear layers and token tables with a frozen base and a small trained part.

    y = W x + b + scale B (A drop(x))                                  lora
    y = m / ||W + scale B A|| (W x + scale B A x) + b                  dora; the norm of each row, taken as a constant

Shapes: T tokens, I in, O out, R rank. W ["O I"] in fp32, bf16, nf4 or int8; A `lora_a` ["R I"], B `lora_b` ["O R"] and
m `magnitude` ["O"] in fp32. A layer keeps the name and the parameters of the one it replaces: `layers.0.attention.q.weight` is
the base, `layers.0.attention.q.lora_a` is new. `initial_a` and `initial_b` (pissa) are where the adapter began; the base lacks
their product, and nothing trains them.
The norm of row o is computed without making W + scale B A:  ||W_o||^2 + 2 scale (W A^T)_o . B_o + scale^2 (B A A^T)_o . B_o.
Sources: LoRA arXiv:2106.09685, DoRA arXiv:2402.09353, PiSSA arXiv:2404.02948.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter_config import QUANTISED, AdapterSection, Precision
from ..model.decoder import LossOutput, TokenTable
from ..model.parts import Linear, RMSNorm
from .quantised import byte_columns, dequantise

KEPT = ("lora_a", "lora_b", "magnitude", "initial_a", "initial_b")  # what a checkpoint holds of an adapted module


class FrozenLinear(Linear):
    """A linear layer whose weight is frozen in the given precision; loaded through sources.py."""

    def __init__(self, replaced: nn.Linear, precision: Precision, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.precision = replaced.in_features, replaced.out_features, precision
        self.bias = None if replaced.bias is None else frozen(replaced.bias)
        if precision in QUANTISED:
            rows, device = self.out_features, replaced.weight.device
            codes, scales = byte_columns(precision, self.in_features, name)
            self.weight = frozen(torch.empty(rows, codes, dtype=torch.uint8, device=device))
            self.scales = frozen(torch.empty(rows, scales, dtype=torch.uint8, device=device))
        else:
            self.weight = in_precision(replaced.weight, precision)
            self.register_parameter("scales", None)

    def product(self, x: Tensor) -> Tensor:
        """W x in the compute dtype. Backward dequantises or casts W again instead of keeping it."""
        dtype = compute_dtype(x)
        if self.weight.dtype == dtype:
            return F.linear(x, self.weight)
        product: Tensor = FrozenProduct.apply(x.to(dtype), self.weight, self.scales, self.precision)
        return product

    def dense(self) -> Tensor:
        """W in fp32."""
        return dense_weight(self.weight, self.scales, self.precision, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class AdaptedLinear(FrozenLinear):
    """A frozen linear layer with a LoRA or DoRA adapter; `adapters_off` shows the layer that training started from."""

    def __init__(self, replaced: nn.Linear, precision: Precision, settings: AdapterSection, name: str) -> None:
        super().__init__(replaced, precision, name)
        self.scale, self.dropout, self.is_on = settings.scale, settings.dropout, True
        rank, device = settings.rank, replaced.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, device=device))
        dora, pissa = settings.method == "dora", settings.init == "pissa"
        self.magnitude = nn.Parameter(torch.empty(self.out_features, device=device)) if dora else None
        self.initial_a = frozen(torch.empty_like(self.lora_a)) if pissa else None
        self.initial_b = frozen(torch.empty_like(self.lora_b)) if pissa else None

    def forward(self, x: Tensor) -> Tensor:
        base = self.product(x)
        a, b = (self.lora_a, self.lora_b) if self.is_on else (self.initial_a, self.initial_b)
        if a is not None and b is not None:
            dropped = F.dropout(x, self.dropout) if self.dropout and self.training and self.is_on else x
            dtype = base.dtype
            update = F.linear(F.linear(dropped.to(dtype), a.to(dtype)), b.to(dtype)) * self.scale
            if self.magnitude is not None:
                factor = (self.magnitude / self.row_norms()).to(dtype)
                # without dropout: factor (base + update)
                base = base + ((factor - 1) * (base if dropped is x else self.product(dropped)) + factor * update)
            else:
                base = base + update
        return base if self.bias is None else base + self.bias.to(base.dtype)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Norms of the rows of W + scale B A, Float32["O"]."""
        with torch.autocast(self.weight.device.type, enabled=False):
            w, a, b = self.dense(), self.lora_a.float(), self.lora_b.float()
            square = (w * w).sum(1) + 2 * self.scale * ((w @ a.T) * b).sum(1) + self.scale**2 * ((b @ (a @ a.T)) * b).sum(1)
            return square.clamp(min=0).sqrt()


class AdaptedTable(TokenTable):
    """An embedding or a head with a LoRA adapter: for an embedding A is ["R V"] and B ["H R"], for a head ["R H"] and ["V R"].

    The loss takes W + scale B A as one matrix of its own and makes its whole gradient: as much work as training the head.
    """

    def __init__(self, replaced: TokenTable, precision: Precision, settings: AdapterSection, is_head: bool) -> None:
        nn.Module.__init__(self)
        self.weight = in_precision(replaced.weight, precision)
        self.softcap, self.logit_divisor, self.impl = replaced.softcap, replaced.logit_divisor, replaced.impl
        self.scale, self.is_on = settings.scale, True
        self.dropout, self.is_head = 0.0, is_head
        rows, hidden = replaced.weight.shape
        self.in_features, self.out_features = (hidden, rows) if is_head else (rows, hidden)
        self.lora_a = nn.Parameter(torch.empty(settings.rank, self.in_features, device=self.weight.device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, settings.rank, device=self.weight.device))

    def forward(
        self,
        x: Tensor,
        *,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        embed: bool = False,
        objective: Callable[[Tensor], LossOutput] | None = None,
        norm: RMSNorm | None = None,
    ) -> Tensor | LossOutput:
        if not self.is_on:
            return super().forward(x, targets=targets, rows=rows, embed=embed, objective=objective, norm=norm)
        if embed:
            looked_up = F.embedding(x, self.lora_a.T)
            return F.embedding(x, self.weight) + F.linear(looked_up, self.lora_b) * self.scale
        whole = self.weight + (self.lora_b @ self.lora_a) * self.scale
        return self.classify(whole, x, targets, objective, rows=rows, norm=norm)


class FrozenProduct(torch.autograd.Function):
    """x ["T I"] times the transpose of a frozen weight of another dtype; keeps its codes, not the weight made of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor | None, precision: Precision) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.precision = precision
        return x @ dense_weight(weight, scales, precision, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scales = ctx.saved_tensors
        return grad @ dense_weight(weight, scales, ctx.precision, grad.dtype), None, None, None


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what it did before its adapters were trained."""
    modules = [module for module in model.modules() if isinstance(module, AdaptedLinear | AdaptedTable)]
    for module in modules:
        module.is_on = False
    try:
        yield
    finally:
        for module in modules:
            module.is_on = True


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that nothing trains."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def in_precision(weight: Tensor, precision: Precision) -> nn.Parameter:
    """A frozen place for a dense weight; what is not fp32 is bf16. No values: the base is loaded later."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return frozen(weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype))


def dense_weight(weight: Tensor, scales: Tensor | None, precision: Precision, dtype: torch.dtype) -> Tensor:
    """A frozen weight in a floating-point dtype."""
    if scales is None:
        return weight.to(dtype)
    return dequantise(weight, scales, precision, dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
