"""One parity case: a way to compute the same few training steps (see parity.py), and what all cases share.

PACKS packs of PACK_TOKENS tokens per step, over a vocabulary of VOCABULARY tokens, for STEPS steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["packed", "padded"]
Kernels = Literal["reference", "torch", "triton", "auto"]
Weights = Literal["full", "lora", "nf4"]

PACKS, PACK_TOKENS, VOCABULARY, STEPS = 16, 24, 61, 3
INTERPRETED_STEPS = 2  # Triton's interpreter takes seconds per step
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # fp32: sums in another order; a wrong factor or mask is off by over 1e-2


@dataclass(frozen=True)
class Case:
    """One way to compute the same steps. kernels: `torch` is what a CPU takes, `auto` what a GPU takes.

    context: so many of the processes divide each batch; method: how they attend together (parallel.context_method).
    weights: all are trained, or a LoRA adapter on a frozen base in fp32 or in 4 bits; each kind has a reference of its own.
    """

    engine: str
    world_size: int
    accumulation: int = 1
    layout: Layout = "packed"
    checkpointing: bool = False
    kernels: Kernels = "reference"
    weights: Weights = "full"
    context: int = 1
    method: Literal["auto", "ulysses", "ring"] = "auto"


REFERENCE = Case("single", 1)
REFERENCES: dict[Weights, Case] = {
    "full": REFERENCE,
    "lora": Case("single", 1, weights="lora"),
    "nf4": Case("single", 1, weights="nf4"),
}
