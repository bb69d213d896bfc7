"""The class that computes a configuration: our decoder, or a model of transformers."""

from __future__ import annotations

import torch

from ..foreign_config import ForeignConfig
from ..model.decoder import Decoder
from ..model.language_model import LanguageModel
from ..model_config import KernelSection, ModelConfig


def build_model(config: ModelConfig, kernels: KernelSection | None = None) -> LanguageModel:
    """The model with undefined weights. Raises ConfigError where transformers is needed and missing, or refuses it."""
    if isinstance(config, ForeignConfig):
        from .foreign_model import ForeignModel

        return ForeignModel(config, kernels)
    return Decoder(config, kernels)


def tensor_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every tensor that a checkpoint of the model holds, with its shape; nothing is allocated."""
    with torch.device("meta"):
        model = build_model(config)
        return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.constants())}
