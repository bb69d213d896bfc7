"""Rotary positions: the angles of RoPE, and how they are stretched for longer contexts.

    angle[t, i] = position[t] * f[i],  f[i] = theta^(-2i/D),  i < D/2
    linear:  f / factor
    llama3:  wavelengths below original/high_freq_factor keep f, above original/low_freq_factor get f / factor, a line between
    yarn:    a ramp over the channel index between f (many rotations in the original context) and f / factor (few of them);
             cos and sin are multiplied by 0.1 ln(factor) + 1 unless attention_factor says otherwise
    longrope: f / short_factor[i] within the original context; cos and sin times sqrt(1 + ln(factor) / ln(original))

Channel i is rotated together with channel i + D/2 (the layout of Hugging Face; GGUF stores neighbours, see convert/gguf).
Where only R channels of a head rotate, R stands for D above, and `pairs_apart` brings their pairs to these places.
Sources: RoFormer arXiv:2104.09864, YaRN arXiv:2309.00071, LongRoPE arXiv:2402.13753, the configuration of Llama 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model_config import ModelConfig, RopeScaling


class Rotary:
    """The angles of a model's positions.

    windowed: those of its layers with a sliding window, where these have a base of their own.
    No module with buffers: engines cast buffers to bf16, where neighbouring frequencies become one, and leave them on "meta".
    """

    def __init__(self, config: ModelConfig, windowed: bool = False) -> None:
        if windowed and config.window_rope_theta is not None:
            config = config.model_copy(update={"rope_theta": config.window_rope_theta, "rope_scaling": None})
        turning, factor = inverse_frequencies(config)
        still = config.d_head // 2 - turning.numel()
        self._frequencies = torch.cat((turning, turning.new_zeros(still)))  # (D/2,)
        # channels that do not turn keep their length, too
        self._factor = torch.cat((turning.new_full((turning.numel(),), factor), turning.new_ones(still)))
        self._is_one = factor == 1.0
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, Float32["T D/2"] each, of Int positions ["T"]."""
        found = self._on.get(positions.device)
        if found is None:
            found = self._frequencies.to(positions.device), self._factor.to(positions.device)
            self._on[positions.device] = found
        frequencies, factor = found
        angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self._is_one else (cos * factor, sin * factor)


def pairs_apart(x: Tensor, rotary: int, interleaved: bool) -> Tensor:
    """Channels ["... D"] in an order where channel i turns with i + D/2. The first `rotary` of x turn, the others do not.

    interleaved: neighbours are pairs in x, else its first half of the rotating channels with its second.
    """
    turning, still = x[..., :rotary], x[..., rotary:]
    first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    still_first, still_second = still.chunk(2, dim=-1)
    return torch.cat((first, still_first, second, still_second), dim=-1)


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, Float32["R/2"] on the CPU, and the factor on cos and sin."""
    R = config.rotary_dim or config.d_head
    # device="cpu" is explicit: models are also built under torch.device("meta")
    exponent = torch.arange(0, R, 2, dtype=torch.int64, device="cpu").float() / R
    base = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling), 1.0
    if scaling.kind == "longrope":
        short = torch.tensor(scaling.short_factor, dtype=torch.float32, device="cpu")
        return 1.0 / (short * config.rope_theta**exponent), longrope_attention_factor(scaling)
    return _yarn(base, scaling, config.rope_theta), yarn_attention_factor(scaling)


def longrope_attention_factor(scaling: RopeScaling) -> float:
    """What LongRoPE multiplies cos and sin by."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context))


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies cos and sin by (so scores grow by its square)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0


def _llama3(base: Tensor, scaling: RopeScaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rotations = scaling.original_context * base / (2 * math.pi)  # turns made within the original context
    keep = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * base / scaling.factor + keep * base


def _yarn(base: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    half = base.numel()

    def channel(rotations: float) -> float:
        """Index of the pair that makes so many turns within the original context."""
        return half * math.log(scaling.original_context / (rotations * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(channel(scaling.beta_fast)), 0)
    last = min(math.ceil(channel(scaling.beta_slow)), 2 * half - 1)
    width = last - first if last != first else 0.001
    stretched = ((torch.arange(half, dtype=torch.float32, device="cpu") - first) / width).clamp(0.0, 1.0)
    return stretched * base / scaling.factor + (1 - stretched) * base
