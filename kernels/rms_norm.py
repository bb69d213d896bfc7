"""Public name of `layer.rms_norm`."""

from .layer.rms_norm import rms_norm, rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
