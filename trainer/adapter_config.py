"""`adapter:` of a recipe: which small matrices are trained beside a frozen base, and what of them a checkpoint must record.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from chatmill.config import Section

Precision = Literal["fp32", "bf16", "nf4", "int8"]
QUANTISED = ("nf4", "int8")


class AdapterSection(Section):
    """LoRA: W x + scale B A x with W frozen, A ["rank in"], B ["out rank"] (arXiv:2106.09685). docs/adapters.md.

    method: `lora`, or `dora`, which also trains the length of every row of W + scale B A (arXiv:2402.09353).
    scale: alpha / rank, or alpha / sqrt(rank) with rslora (arXiv:2312.03732). dropout: on what enters A, while training.
    targets: names or patterns of modules: `q`, `mlp.*`, `layers.0.*`, `embed`, `head`; Hugging Face's `q_proj` is `q`.
    `all-linear` is every matrix of the layers. init: `default` starts as the base itself; `pissa` gives the adapter the
    largest singular directions of W and freezes the rest (arXiv:2404.02948).
    train: patterns of parameter names that are trained whole beside the adapter (`*norm.weight`, `head.weight`).
    """

    method: Literal["lora", "dora"] = "lora"
    rank: int = Field(default=16, gt=0, le=4096)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=("all-linear",), min_length=1)
    rslora: bool = False
    init: Literal["default", "pissa"] = "default"
    train: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @model_validator(mode="after")
    def _check_init(self) -> AdapterSection:
        if self.init == "pissa" and self.method == "dora":
            raise ValueError("init=pissa belongs to method=lora: DoRA starts from the length of the base's own rows")
        return self
