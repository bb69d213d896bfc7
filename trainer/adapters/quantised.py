"""Frozen weights in 4 or 8 bits, in the formats of bitsandbytes.

    nf4    16 levels of a normal distribution, one fp32 scale per 64 consecutive elements of a row (QLoRA, arXiv:2305.14314)
    int8   one fp32 scale per row (LLM.int8, arXiv:2208.07339, without its outlier columns: no activation is quantised)

A weight ["rows columns"] becomes codes Uint8["rows bytes"] and scales Uint8["rows bytes"] (the bits of fp32). Both keep the
rows of the weight, so that FSDP2 shards them as it shards weights, and gathers them as bytes whatever the compute dtype is. A
block never crosses a row: each rank quantises its own rows and gets the bits that one process gets.
Needs the extra `adapters`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from chatmill.config import ConfigError

from ..adapter_config import Precision

BLOCK = 64  # elements that share a scale in nf4


def library() -> Any:
    """bitsandbytes.functional. Raises ConfigError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ConfigError(
            f"model.base_precision=nf4 and int8 need bitsandbytes, which cannot be imported ({error}).\n"
            "Install it with: pip install 'chatmill[adapters]', or use model.base_precision=bf16."
        ) from error
    return bitsandbytes.functional


def byte_columns(precision: Precision, columns: int, name: str = "a weight") -> tuple[int, int]:
    """Bytes per row of (codes, scales) for a weight with so many columns. Raises ConfigError where blocks do not fit."""
    if precision == "int8":
        return columns, 4
    if columns % BLOCK:
        raise ConfigError(
            f"model.base_precision=nf4: {name} has {columns} columns, not a multiple of {BLOCK}.\n"
            "Use model.base_precision=int8 or bf16."
        )
    return columns // 2, columns // BLOCK * 4


@torch.no_grad()
def quantise(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """(codes, scales) of Float["rows columns"], on its device."""
    rows, columns = weight.shape
    code_bytes, scale_bytes = byte_columns(precision, columns)
    weight = weight.float().contiguous()
    if not rows:
        return weight.new_empty(0, code_bytes, dtype=torch.uint8), weight.new_empty(0, scale_bytes, dtype=torch.uint8)
    if precision == "int8":
        codes, scales, _ = library().int8_vectorwise_quant(weight)
        return codes.view(torch.uint8), scales.float().view(rows, 1).view(torch.uint8)
    packed, state = library().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return packed.view(rows, code_bytes), state.absmax.float().view(rows, -1).view(torch.uint8)


def dequantise(codes: Tensor, scales: Tensor, precision: Precision, dtype: torch.dtype) -> Tensor:
    """Float["rows columns"] of dtype: what `quantise` has kept of a weight."""
    rows, columns = codes.shape[0], codes.shape[1] * (1 if precision == "int8" else 2)
    if _PLANNING:
        return codes.new_empty((rows, columns), dtype=dtype)
    stats = scales.contiguous().view(torch.float32)
    if precision == "int8":  # bitsandbytes.functional.int8_vectorwise_dequant, without an fp32 copy of the whole
        return torch.mul(
            codes.view(torch.int8), stats / 127.0, out=torch.empty(rows, columns, dtype=dtype, device=codes.device)
        )
    functional = library()
    state = functional.QuantState(
        absmax=stats.reshape(-1),
        shape=torch.Size((rows, columns)),
        code=_levels(codes.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    whole: Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return whole


def rounded(weight: Tensor, precision: Precision) -> Tensor:
    """The weight as a base of this precision has it, in fp32."""
    if precision in ("nf4", "int8"):
        return dequantise(*quantise(weight, precision), precision, torch.float32)
    return (weight.bfloat16() if precision == "bf16" else weight).float()


_LEVELS: dict[torch.device, Tensor] = {}


def _levels(device: torch.device) -> Tensor:
    """The 16 values of nf4."""
    if device not in _LEVELS:
        _LEVELS[device] = library().get_4bit_type("nf4", device=device)
    return _LEVELS[device]


_PLANNING = False


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """Within this context `dequantise` gives tensors without values: a plan needs no bitsandbytes."""
    global _PLANNING
    _PLANNING = True
    try:
        yield
    finally:
        _PLANNING = False
