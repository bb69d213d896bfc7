"""The state of every random generator of this process as tensors, and back: no pickle.

    tensors = random_state(device)          # {"cpu", "cuda", "numpy", "python"}
    restore_random_state(tensors, device)

Kinds: torch's generator of the CPU, of this rank's GPU, numpy's legacy global generator, Python's `random`.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """One tensor per kind of generator."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor([version, *words, gauss is not None, _bits(gauss or 0.0)], dtype=torch.int64),
        "numpy": torch.tensor([*(int(k) for k in keys), int(position), int(has_gauss), _bits(float(cached))]),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators for which a state is given."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if "python" in states:
        version, *words, has_gauss, bits = states["python"].tolist()
        random.setstate((version, tuple(words), _value(bits) if has_gauss else None))
    if "numpy" in states:
        *keys, position, has_gauss, bits = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, _value(bits)))


def _bits(value: float) -> int:
    """A double's 64 bits as a signed integer."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _value(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
