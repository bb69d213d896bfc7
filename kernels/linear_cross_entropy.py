"""Public name of `cross_entropy.interface`."""

from .cross_entropy.interface import LossMetrics, linear_cross_entropy, linear_cross_entropy_reference

__all__ = ["LossMetrics", "linear_cross_entropy", "linear_cross_entropy_reference"]
