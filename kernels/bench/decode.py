"""Benchmark cases of decoding attention: one new token per conversation against its cache.

    python -m chatmill.kernels.bench decode_attention

Work counted: the visible keys and values, read once. The rate is a fraction of the measured copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.decode import decode_attention
from .harness import BenchCase, Phases

Decode = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, key cache, value cache, lengths -> out


def bench_cases() -> Iterator[BenchCase]:
    """1 to 64 conversations, caches of 2k to 32k rows, grouped heads, D 64 and 128."""
    for B, C, heads, kv_heads, D in (
        (1, 4096, 32, 8, 128),
        (1, 32768, 32, 8, 128),
        (16, 4096, 32, 8, 128),
        (64, 2048, 32, 8, 128),
        (32, 4096, 16, 16, 128),
        (32, 4096, 32, 4, 64),
    ):
        yield BenchCase(
            "decode_attention",
            f"B{B} cache {C} H{heads}/{kv_heads} D{D} bf16",
            {name: _prepare(decode, B, C, heads, kv_heads, D) for name, decode in CONTENDERS.items()},
            bytes={"forward": 4.0 * B * C * kv_heads * D},
        )


def _prepare(decode: Decode, B: int, C: int, heads: int, kv_heads: int, D: int) -> Callable[[torch.device], Phases]:
    def prepare(device: torch.device) -> Phases:
        q = torch.randn(B, heads, D, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(B, C, kv_heads, D, device=device, dtype=torch.bfloat16) for _ in range(2))
        lengths = torch.full((B,), C, device=device, dtype=torch.int32)
        return {"forward": lambda: decode(q, k, v, lengths)}

    return prepare


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Full caches, so no mask is needed: torch's best case."""
    out = F.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
    return out.squeeze(2)


def _flash(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    out: Tensor = flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=lengths)
    return out.squeeze(1)


CONTENDERS: dict[str, Decode] = {
    "triton": lambda q, k, v, lengths: decode_attention(q, k, v, lengths, impl="triton"),
    "torch": lambda q, k, v, lengths: decode_attention(q, k, v, lengths, impl="torch"),
    "sdpa": _sdpa,
    "flash": _flash,
}
