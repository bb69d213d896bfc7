"""Public names of the linear head of `cross_entropy`."""

from .cross_entropy import (
    LossMetrics,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_metrics,
)

__all__ = ["LossMetrics", "linear_cross_entropy", "linear_cross_entropy_reference", "linear_cross_entropy_with_metrics"]
