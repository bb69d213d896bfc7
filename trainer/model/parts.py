"""The parts of a layer that see one token at a time: linear layers, norms and the feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.dispatch import Impl
from ...kernels.layer.geglu import geglu
from ...kernels.layer.rms_norm import rms_norm
from ...kernels.layer.rope import rope_one
from ...kernels.layer.swiglu import swiglu
from ..model_config import ModelConfig


class Linear(nn.Linear):
    """A linear layer left uninitialised: Decoder.init_weights or a checkpoint fills it."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis."""

    def __init__(self, size: int, config: ModelConfig, impl: Impl) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.impl = impl

    def factor(self) -> Tensor:
        """What multiplies: the weight, or 1 + weight in fp32, where bf16 would round the sum."""
        return self.weight.float() + self.offset if self.offset else self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual the norm of their sum, and the sum, in one pass over memory."""
        if residual is None:
            return rms_norm(x, self.factor(), self.eps, impl=self.impl)
        return rms_norm(x, self.factor(), self.eps, residual, impl=self.impl)


class HeadNorm(RMSNorm):
    """RMSNorm of every head's channels and, where there are angles, the rotation behind it in the same pass over memory."""

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """x Float["T heads D"]; turn: cos and sin Float["T D/2"]."""
        if turn is None:
            return rms_norm(x, self.factor(), self.eps, impl=self.impl)
        return rope_one(x, *turn, norm=self.factor(), norm_eps=self.eps, impl=self.impl)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); or GeGLU, with gelu for silu."""

    def __init__(self, config: ModelConfig, impl: Impl) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = config.activation
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        out: Tensor = self.down(geglu(gate, up) if self.activation == "gelu_tanh" else swiglu(gate, up, impl=self.impl))
        return out
