"""The class that computes a configuration: our decoder, or a model of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from chatmill.config import ConfigError

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


@contextlib.contextmanager
def traceable(config: ModelConfig) -> Iterator[None]:
    """Within this context the model can run on fake tensors. Raises ConfigError where its layers look at values."""
    if not isinstance(config, ForeignConfig):
        yield
        return
    import transformers.integrations.moe as experts
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    # torch's grouped product takes no fp32 on fake tensors; the operator in its place makes tensors of the same sizes
    with mock.patch.object(experts, "_can_use_grouped_mm", lambda *args, **options: False):
        try:
            yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"{config.name}: its memory cannot be foreseen, because layers look at values ({error})."
            ) from error


def tensor_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every tensor that a checkpoint of the model holds, with its shape; nothing is allocated."""
    with torch.device("meta"):
        model = build_model(config)
        return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.constants())}
