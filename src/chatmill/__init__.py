"""Chatmill: from raw conversations to a chat model that answers.

The four parts are namespace packages: `chatmill.data`, `chatmill.kernels`, `chatmill.trainer`, `chatmill.launcher`.
Nothing heavy is imported here; the names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "attention": "chatmill.kernels.attention.interface",
    "linear_cross_entropy": "chatmill.kernels.cross_entropy.interface",
    "PackedStream": "chatmill.data.stream",
    "Recipe": "chatmill.trainer.config",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'chatmill' has no attribute {name!r}")
