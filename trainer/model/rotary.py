"""Rotary positions: the angles of RoPE, and how they are stretched for longer contexts.

    angle[t, i] = position[t] * f[i],  f[i] = theta^(-2i/D),  i < D/2
    linear:  f / factor
    llama3:  wavelengths below original/high_freq_factor keep f, above original/low_freq_factor get f / factor, a line between
    yarn:    a ramp over the channel index between f (many rotations in the original context) and f / factor (few of them);
             cos and sin are multiplied by 0.1 ln(factor) + 1 unless attention_factor says otherwise

Channel i is rotated together with channel i + D/2 (the layout of Hugging Face; GGUF stores neighbours, see convert/gguf).
Sources: RoFormer arXiv:2104.09864, YaRN arXiv:2309.00071, the configuration of Llama 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model_config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, Float32["D/2"] on the CPU, and the factor on cos and sin."""
    D = config.d_head
    # device="cpu" is explicit: models are also built under torch.device("meta")
    exponent = torch.arange(0, D, 2, dtype=torch.int64, device="cpu").float() / D
    base = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling), 1.0
    return _yarn(base, scaling, config.rope_theta), yarn_attention_factor(scaling)


def rotary_tables(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, Float32["T D/2"] each, of Int positions ["T"]; frequencies ["D/2"] on the device of positions."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


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
