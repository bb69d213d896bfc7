"""One decoding step for many replies at once: each may have another length.

    steps = next_steps(model, [generation_a, generation_b, ...])      # one TokenStep or None (over) per generation

The weights are read once for all: decoding is bound by reading them, so 8 replies cost little more than one.
Attention runs per reply over its own cache; prompts are read one reply at a time. Results equal those of separate
replies up to the rounding of a wider matrix product.

Shapes: B replies, H model width, Hq and Hk query and key heads, D channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chatmill.kernels.rope import rope
from chatmill.trainer.generation import Generation, TokenStep
from chatmill.trainer.kv_cache import KVCache, cached_attention
from chatmill.trainer.model import Attention, Block, Decoder


def next_steps(model: Decoder, generations: Sequence[Generation]) -> list[TokenStep | None]:
    """Advance every generation by one token; None for those that are over."""
    rows = joint_logits(model, generations)
    return [g.accept(rows[i]) if i in rows else next(g, None) for i, g in enumerate(generations)]


def joint_logits(model: Decoder, generations: Sequence[Generation]) -> dict[int, Tensor]:
    """Logits Float32["V"] by index, for the generations that have one token to read; empty when these are fewer than two.

    Their caches then hold that token; an exception leaves all caches as they were.
    """
    ready = [i for i, g in enumerate(generations) if not g.is_over and g.pending.numel() == 1]
    if len(ready) < 2:
        return {}
    picked = [generations[i] for i in ready]
    logits = batched_logits(model, torch.cat([g.pending for g in picked]), [g.cache for g in picked])
    return dict(zip(ready, logits, strict=True))


@torch.no_grad()
def batched_logits(model: Decoder, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor:
    """Logits Float32["B V"] after token i is appended to cache i. tokens: Int["B"]."""
    for cache in caches:
        cache.reserve(1)
    positions = torch.tensor([cache.length for cache in caches], device=tokens.device)
    cu_seqlens = torch.arange(len(caches) + 1, dtype=torch.int32, device=tokens.device)
    layout = model._layout(positions, cu_seqlens, 1, None)
    x = model.embed(tokens, embed=True)
    for block in model.layers:
        assert isinstance(block, Block)
        mixed = _attend(block.attention, block.attention_norm(x), layout.cos, layout.sin, caches)
        normed, x = block.mlp_norm(mixed, residual=x)
        x = x + block.mlp(normed)
    for cache in caches:
        cache.length += 1
    table = model.embed if model.head is None else model.head
    logits: Tensor = table(model.norm(x))
    return logits


def _attend(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[KVCache]) -> Tensor:
    B, D = x.shape[0], attention.d_head
    q = attention.q(x).view(B, -1, D)  # (B, Hq, D)
    k = attention.k(x).view(B, -1, D)  # (B, Hk, D)
    v = attention.v(x).view(B, -1, D)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = rope(q, k, cos, sin, impl=attention.kernels.elementwise)
    out = torch.empty_like(q)
    for i, cache in enumerate(caches):
        keys, values = cache.write(attention.layer, k[i : i + 1], v[i : i + 1])
        out[i : i + 1] = cached_attention(
            q[i : i + 1], keys.to(q.dtype), values.to(q.dtype), window=attention.window, softcap=attention.softcap
        )
    projected: Tensor = attention.o(out.reshape(B, -1))
    return projected
