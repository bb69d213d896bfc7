"""How a foreign model makes logits of its classifier's products, found by experiment.

scale, softcap = rule_of(raw, where)         # logits = softcap * tanh(scale * h W^T / softcap)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from chatmill.config import ConfigError

from .architecture import Foreign, build_foreign

_FOUND: dict[str, tuple[float, float | None]] = {}


def rule_of(raw: Mapping[str, Any], where: str) -> tuple[float, float | None]:
    """logits_rule of the architecture in a config.json; the experiment is made once."""
    key = json.dumps(raw, sort_keys=True, default=str)
    if key not in _FOUND:
        with unset_fake_temporarily(), torch.device("meta"):
            model = build_foreign(raw, where)
        with unset_fake_temporarily():
            _FOUND[key] = logits_rule(model)
    return _FOUND[key]


class _Output:
    """A decoder's output with nothing but its last hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands for the decoder: gives the hidden states that it holds."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **options: Any) -> Any:
        return _Output(self.hidden)


@torch.no_grad()
def logits_rule(model: Foreign) -> tuple[float, float | None]:
    """(scale, softcap) with which the model makes logits of its classifier's products: softcap * tanh(scale * x / softcap).

    Found by experiment: the model's own forward pass runs on hidden states that are given, with a small classifier in the
    place of its own. Raises ConfigError where it does something else.
    """
    causal, config = model.causal, model.causal.config
    body, head, width = model.body, model.head, model.head.in_features
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 7, width, generator=generator, dtype=torch.float32) * 3
        small = nn.Linear(width, 11, bias=False, dtype=torch.float32)
        small.weight.copy_(torch.randn(11, width, generator=generator))
        try:
            setattr(causal, model.prefix, _Given(hidden))
            setattr(causal, model.head_name, small)
            try:
                found = causal(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=False).logits.double()
            except Exception as error:  # its forward asks for more than a decoder's output
                raise ConfigError(f"{type(causal).__name__}: its logits cannot be taken apart ({error}).") from error
        finally:
            setattr(causal, model.prefix, body)
            setattr(causal, model.head_name, head)
        products = small(hidden).double()
    cap = getattr(config, "final_logit_softcapping", None)
    caps = [None] if not cap else [float(cap), None]
    for softcap in caps:
        for scale in _scales(config):
            wanted = products * scale
            wanted = wanted if softcap is None else softcap * torch.tanh(wanted / softcap)
            if torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
                return scale, softcap
    raise ConfigError(f"{type(causal).__name__}: its logits are neither scaled nor capped products; it is not supported.")


def _scales(config: Any) -> list[float]:
    found = [1.0]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_scale", "output_multiplier_scale"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value and math.isfinite(value):
            found += [float(value), 1.0 / float(value)]
    if base := getattr(config, "dim_model_base", None):  # MiniCPM
        found.append(float(base) / config.hidden_size)
    return found
