"""The parameters of a decoder, known before any memory is taken for them."""

from __future__ import annotations

import torch

from ..model_config import ModelConfig
from .decoder import Decoder


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter of the decoder with its shape; nothing is allocated."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}
