"""Cross-entropy of a linear head: the public names."""

from .interface import LossMetrics, linear_cross_entropy, linear_cross_entropy_reference

__all__ = ["LossMetrics", "linear_cross_entropy", "linear_cross_entropy_reference"]
