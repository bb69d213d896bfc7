"""Public name of `layer.swiglu`."""

from .layer.swiglu import swiglu, swiglu_reference

__all__ = ["swiglu", "swiglu_reference"]
