"""Keys and values of the tokens read so far, and attention over them: what decoding needs.

    cache = KVCache(config, capacity=2048, dtype=torch.float32, device="cpu")
    logits = model.cached_logits(prompt_ids, cache)      # fills the cache; then one token at a time
    cache.truncate(n)                                    # forget everything after the first n tokens

Keys are stored after rotation, so a cached token keeps its absolute position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.attention.decode import decode_attention
from ...kernels.dispatch import why_no_triton
from ..model_config import ModelConfig


class KVCache:
    """One conversation's keys and values, preallocated.

    k, v: ["layers Hk capacity D"]; head first, so that decoding reads each head's keys as one stretch of memory.
    length: tokens held. decode: implementation of decode_attention for single tokens, or "" for torch's attention; on a GPU
    that Triton knows it is the split-K kernel.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        if capacity < 1:
            raise ValueError(f"KVCache: capacity must be at least 1 token, got {capacity}.")
        shape = (config.layers, config.kv_heads, capacity, config.d_head)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0
        on_gpu = self.k.is_cuda and why_no_triton(self.k.device) is None
        self.decode = "auto" if on_gpu else ""
        self._end = torch.zeros(1, dtype=torch.int32, device=device)  # tokens held during a step, where the kernel reads it
        self._end_is = 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KVCache.truncate: expected 0..{self.length} tokens to keep, got {length}.")
        self.length = length

    def reserve(self, tokens: int) -> None:
        """Raise ValueError for tokens that do not fit. Called before any layer writes."""
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"KVCache: {self.length} + {tokens} tokens exceed the capacity of {self.capacity}.\n"
                "Shorten the conversation or create the cache with a larger capacity."
            )

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v ["Tq Hk D"] after the tokens held; returns this layer's k, v ["Hk length+Tq D"] (views)."""
        end = self.length + k.shape[0]
        self.k[layer, :, self.length : end] = k.transpose(0, 1)
        self.v[layer, :, self.length : end] = v.transpose(0, 1)
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, scale: float | None
    ) -> Tensor:
        """Store k and v, then causal attention of q over everything held; see `chatmill.trainer.model.decoder.TokenMemory`."""
        keys, values = self.write(layer, k, v)
        if self.decode and len(q) == 1 and keys.dtype == q.dtype:
            if self._end_is != keys.shape[1]:
                self._end_is = keys.shape[1]
                self._end.fill_(self._end_is)
            whole = (self.k[layer].transpose(0, 1)[None], self.v[layer].transpose(0, 1)[None])  # (1, capacity, Hk, D)
            options = {"window": window, "softcap": softcap, "scale": scale}
            return decode_attention(q, *whole, self._end, impl=self.decode, **options)  # type: ignore[arg-type]
        return cached_attention(q, keys.to(q.dtype), values.to(q.dtype), window=window, softcap=softcap, scale=scale)


class CacheRows:
    """The memory of a batch: row i attends over cache i, and only there."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self._caches = caches

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, scale: float | None
    ) -> Tensor:
        """Row by row; see `chatmill.trainer.model.decoder.TokenMemory`."""
        out = torch.empty_like(q)
        for i, cache in enumerate(self._caches):
            row = slice(i, i + 1)
            out[row] = cache.attend(layer, q[row], k[row], v[row], window=window, softcap=softcap, scale=scale)
        return out


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest tokens over everything cached.

    q ["Tq Hq D"] belongs to the last Tq of the keys; k, v ["Hk Tk D"]. Returns ["Tq Hq D"].
    scale: of the scores, default D ** -0.5.
    seen: Bool ["Tq Tk"], which keys a query may look at, instead of the causal rule and the window.
    """
    Tq, Hq, D = q.shape
    Hk, Tk, _ = k.shape
    if seen is None and Tq == 1 and window is not None and Tk > window:
        k, v, Tk = k[:, Tk - window :], v[:, Tk - window :], window
    # query heads that share a key head become rows of one query block: no copy of the keys per query head
    grouped = q.view(Tq, Hk, Hq // Hk, D).permute(1, 2, 0, 3).reshape(Hk, Hq // Hk * Tq, D)  # (Hk, G*Tq, D)
    if seen is None and Tq > 1:
        seen = _causal_mask(Tq, Tk, window, q.device)
    mask = None if seen is None else seen.repeat(Hq // Hk, 1)  # (G*Tq, Tk)
    if softcap is None:
        parts = grouped.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)[0]
    else:
        scores = (grouped @ k.transpose(1, 2)).float() * (D**-0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
    return out.view(Hk, Hq // Hk, Tq, D).permute(2, 0, 1, 3).reshape(Tq, Hq, D)


def _causal_mask(Tq: int, Tk: int, window: int | None, device: torch.device) -> Tensor:
    """Bool ["Tq Tk"], True = may look; the queries are the last Tq of the keys."""
    ago = torch.arange(Tk - Tq, Tk, device=device).unsqueeze(1) - torch.arange(Tk, device=device)
    seen = ago >= 0
    return seen if window is None else seen & (ago < window)
