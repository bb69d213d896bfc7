"""Cross-entropy of a linear head, and of logits: the public names."""

from .interface import linear_cross_entropy, linear_cross_entropy_with_metrics
from .logits import cross_entropy
from .reference import linear_cross_entropy_reference
from .rows import LossMetrics

__all__ = [
    "LossMetrics",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_with_metrics",
]
