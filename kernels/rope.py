"""Public name of `layer.rope`."""

from .layer.rope import rope, rope_reference

__all__ = ["rope", "rope_reference"]
