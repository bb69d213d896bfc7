"""Log-probabilities of many candidate replies after one context, which is read once.

    found = score_candidates(model, prompt_ids, [[5, 9, 2], [7, 2]])      -> [(ln p, tokens), ...] in the same order

    ln p(reply | context) = sum over its tokens of ln p(token | context, tokens of the reply before it)

The candidates lie end to end in one forward pass; each sees the context and itself. Which candidates share a pass depends
on their lengths alone.
Shapes: P tokens of context, C tokens of all candidates of a pass, Hq and Hk query and key heads, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.kv_cache import KVCache, cached_attention
from ..model.language_model import Cache, LanguageModel
from .generation import PREFILL_CHUNK

PASS_TOKENS = 512  # of candidates: bounds the mask (C x (P + C)) and the logits (C x V)


class SharedPrefix:
    """The memory of candidates behind one context: the cache is read, never written."""

    def __init__(self, cache: KVCache, lengths: Sequence[int]) -> None:
        device = cache.k.device
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)  # (C,)
        at = torch.cat([torch.arange(n) for n in lengths]).to(device)
        own = (owner[:, None] == owner[None, :]) & (at[:, None] >= at[None, :])
        self.cache = cache
        self.positions = cache.length + at
        self._seen = torch.cat((torch.ones(len(at), cache.length, dtype=torch.bool, device=device), own), 1)  # (C, P+C)
        self._key_positions = torch.cat((torch.arange(cache.length, device=device), self.positions))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, scale: float | None
    ) -> Tensor:
        """See `chatmill.trainer.model.decoder.TokenMemory`."""
        P = self.cache.length
        keys = torch.cat((self.cache.k[layer, :, :P].to(k.dtype), k.transpose(0, 1)), 1)  # (Hk, P+C, D)
        values = torch.cat((self.cache.v[layer, :, :P].to(v.dtype), v.transpose(0, 1)), 1)
        seen = self._seen
        if window is not None:
            seen = seen & (self.positions[:, None] - self._key_positions[None, :] < window)
        return cached_attention(q, keys, values, softcap=softcap, scale=scale, seen=seen)


@torch.no_grad()
def score_candidates(
    model: LanguageModel, prompt_ids: Sequence[int], candidates: Sequence[Sequence[int]]
) -> list[tuple[float, int]]:
    """(sum of ln p, number of tokens) of each candidate; context and candidate must fit into the model's context."""
    weight = next(model.parameters())
    device, kind = weight.device, weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = model.new_cache(len(prompt_ids) + max(map(len, candidates)), dtype, device)
    last: Tensor | None = None
    for chunk in torch.tensor(list(prompt_ids), dtype=torch.long, device=device).split(PREFILL_CHUNK):
        last = model.cached_logits(chunk, cache)
    assert last is not None
    first = last.log_softmax(-1).double().cpu()
    found = [(float(first[ids[0]]), len(ids)) for ids in candidates]
    if not isinstance(model, Decoder):
        return [(score + _behind(model, cache, ids), n) for (score, n), ids in zip(found, candidates, strict=True)]
    for group in grouped([len(ids) - 1 for ids in candidates], PASS_TOKENS):
        tokens = torch.tensor([i for c in group for i in candidates[c][:-1]], dtype=torch.long, device=device)
        targets = torch.tensor([i for c in group for i in candidates[c][1:]], dtype=torch.long, device=device)
        memory = SharedPrefix(cache, [len(candidates[c]) - 1 for c in group])
        logits = model.classify(model.hidden_states(tokens, memory.positions, memory=memory))
        chances = (logits.gather(1, targets[:, None])[:, 0].double() - logits.logsumexp(-1).double()).cpu()
        at = 0
        for c in group:
            size = len(candidates[c]) - 1
            found[c] = (found[c][0] + float(chances[at : at + size].sum()), found[c][1])
            at += size
    return found


def _behind(model: LanguageModel, cache: Cache, ids: Sequence[int]) -> float:
    """ln p of a candidate's tokens but the first, after the context in the cache and the tokens before them."""
    if len(ids) < 2:
        return 0.0
    length, tokens = cache.length, torch.tensor(list(ids), device=next(model.parameters()).device)
    chances = model.cached_logits(tokens[:-1], cache, all_positions=True).double().log_softmax(-1)
    cache.truncate(length)
    return float(chances.gather(1, tokens[1:, None]).sum())


def grouped(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in order, as many to a group as fit into `tokens`; a longer item has a group to itself, an empty one has none."""
    groups: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length == 0:
            continue
        if not groups or length > room:
            groups.append([])
            room = tokens
        groups[-1].append(i)
        room -= length
    return groups
