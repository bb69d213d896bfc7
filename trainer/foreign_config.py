"""The shape of a model that transformers computes: its config.json as it came, and what plans and engines need of it.

    config = read_config(json.loads(text), where)       # of a checkpoint: ModelConfig of our decoder, or ForeignConfig

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from chatmill.config import validate

from .model_config import ModelConfig

FOREIGN = "transformers"


class ForeignConfig(ModelConfig):
    """Shape of one causal language model of transformers.

    source: config.json as it came. documents: how packed documents are kept apart: `packed` by our attention, `rows` as rows of
    a batch that are padded on the right. table_names: names of the parameters with one row per token, the embedding first.
    windows: tokens that a query of each layer sees (null: all). parts: elements of the parameters by part, the experts that
    every token has a share of among them. experts, experts_per_token: 0 without experts.
    """

    family: Literal["transformers"] = "transformers"
    source: dict[str, Any]
    documents: Literal["packed", "rows"] = "packed"
    table_names: tuple[str, ...] = Field(min_length=1)
    windows: tuple[int | None, ...] = ()
    parts: dict[str, int]
    experts: int = Field(default=0, ge=0)
    experts_per_token: int = Field(default=0, ge=0)

    @property
    def tables(self) -> tuple[str, ...]:
        """See ModelConfig."""
        return self.table_names

    @property
    def name(self) -> str:
        """See ModelConfig."""
        return f"{self.model_type} of transformers"

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        return str(self.source.get("model_type"))

    def hf_config(self) -> dict[str, Any]:
        """config.json of the model as it is now: with rows for new tokens."""
        return self.source | {"vocab_size": self.vocab_size}

    def window_of(self, layer: int) -> int | None:
        """See ModelConfig."""
        return self.windows[layer] if layer < len(self.windows) else None

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part: embedding, attention, mlp, experts, norms (and biases), head, total."""
        rows = int(self.source["vocab_size"])
        counts = {part: n // rows * self.vocab_size if part in ("embedding", "head") else n for part, n in self.parts.items()}
        return counts | {"total": sum(counts.values())}

    def active_parameters(self) -> int:
        """See ModelConfig."""
        counts = self.parameter_counts()
        return counts["total"] - counts["experts"] + self._active_experts()

    def matrix_parameters(self) -> int:
        """See ModelConfig; of the experts, those that one token takes."""
        counts = self.parameter_counts()
        return counts["attention"] + counts["mlp"] + self._active_experts() + self.vocab_size * self.hidden_size

    def _active_experts(self) -> int:
        return self.parts["experts"] * self.experts_per_token // max(1, self.experts)


def read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape in config.json of a checkpoint. Raises ConfigError."""
    return validate(ForeignConfig if raw.get("family") == FOREIGN else ModelConfig, raw, where)
