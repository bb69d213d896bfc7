"""Packed attention in plain torch, document by document: what runs where there is no Triton (CPU, Apple, any dtype).

    S = scale * q k^T (soft-capped, masked),  lse = logsumexp(S),  P = exp(S - lse),  out = P v
    delta = sum(dout * out) - dlse,  dS = P * (dout v^T - delta),  dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T dout

Never builds a T x T matrix: documents of similar length are padded into one batch, long ones are cut into query blocks that see
only the keys they need. The backward recomputes P from the saved log-sum-exp, as the Triton kernels do. bf16 and fp16 are
computed in fp32. Every sum has a fixed order: results are deterministic.

On a CPU, documents without window, soft-cap or LSE gradient go to torch's own fused CPU kernel, 1.5 times faster at 100 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..tensors import wide_dtype
from .rules import Rules

# queries of a long document handled at once: 256 x 2048 fp32 scores of 9 heads are 19 MB
QUERY_BLOCK = 256
# documents up to this length are padded together when the longest is at most 1.25 times the shortest
GROUPED_LENGTH = 256


@dataclass(frozen=True)
class Group:
    """Documents computed together. rows: slice of one document, or (B, L) indices padded with each last row."""

    rows: slice | Tensor
    lengths: Tensor | None
    batch: int
    length: int

    def take(self, x: Tensor) -> Tensor:
        """(T, ...) to (B, L, ...)."""
        if isinstance(self.rows, slice):
            return x[self.rows].unsqueeze(0)
        return x.index_select(0, self.rows.flatten()).unflatten(0, (self.batch, self.length))

    def put(self, into: Tensor, x: Tensor) -> None:
        """Write (B, L, ...) to the documents' rows of (T, ...)."""
        if isinstance(self.rows, slice):
            into[self.rows] = x[0]
        else:
            real = self.real()
            into.index_copy_(0, self.rows[real], x[real].to(into.dtype))

    def real(self) -> Tensor:
        """(B, L) True where a row is not padding."""
        assert self.lengths is not None and isinstance(self.rows, Tensor)
        return torch.arange(self.length, device=self.rows.device)[None] < self.lengths[:, None]


def _covers(bounds: tuple[int, ...], T: int) -> bool:
    """Whether every row of T is in a document."""
    return T == 0 or (len(bounds) > 1 and bounds[0] == 0 and bounds[-1] == T)


@lru_cache(maxsize=64)
def document_groups(bounds: tuple[int, ...], device: torch.device) -> tuple[Group, ...]:
    """Partition of the documents `bounds[i]:bounds[i+1]` into groups of similar length; empty documents vanish."""
    documents = sorted((b - a, a) for a, b in pairwise(bounds) if b > a)
    groups: list[list[tuple[int, int]]] = []
    for length, start in documents:
        shortest = groups[-1][0][0] if groups else 0
        if groups and length <= GROUPED_LENGTH and length <= max(8, shortest * 5 // 4):
            groups[-1].append((length, start))
        else:
            groups.append([(length, start)])
    return tuple(_group(g, device) for g in groups)


def _group(documents: Sequence[tuple[int, int]], device: torch.device) -> Group:
    longest = documents[-1][0]
    if len(documents) == 1:
        length, start = documents[0]
        return Group(slice(start, start + length), None, 1, length)
    lengths = torch.tensor([length for length, _ in documents], device=device)
    starts = torch.tensor([start for _, start in documents], device=device)
    offsets = torch.arange(longest, device=device)[None].minimum(lengths[:, None] - 1)
    return Group(starts[:, None] + offsets, lengths, len(documents), longest)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, QUERY_BLOCK):
        yield first, min(length, first + QUERY_BLOCK)


def _heads_first(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(B, L, H, D) to contiguous (B * Hk, G, L, D)."""
    B, L, H, D = x.shape
    return x.to(dtype).view(B, L, kv_heads, H // kv_heads, D).permute(0, 2, 3, 1, 4).reshape(B * kv_heads, H // kv_heads, L, D)


def _rows_first(x: Tensor, batch: int) -> Tensor:
    """(B * Hk, G, L, D) to (B, L, H, D)."""
    N, G, L, D = x.shape
    return x.view(batch, N // batch, G, L, D).permute(0, 3, 1, 2, 4).reshape(batch, L, (N // batch) * G, D)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b for (N, P, K) @ (N, K, R), one pass."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _masked_scores(q: Tensor, k: Tensor, rules: Rules, mask: Tensor | None) -> Tensor:
    """(N, G, Lq, D), (N, Lk, D) to capped scores (N, G, Lq, Lk), -inf where hidden."""
    N, G, Lq, D = q.shape
    scores = rules.cap_(_scaled_product(q.reshape(N, G * Lq, D), k.transpose(1, 2), rules.scale)).view(N, G, Lq, -1)
    if mask is not None:
        repeat = N // mask.shape[0]
        mask = mask if mask.shape[0] == 1 else mask.repeat_interleave(repeat, 0)
        scores.masked_fill_(mask[:, None], float("-inf"))
    return scores


@lru_cache(maxsize=1)
def _has_grouped_cpu_kernel() -> bool:
    """Whether this torch has the fused CPU kernel and it takes fewer key than query heads: tried once, on four numbers."""
    try:
        q = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q[:, :1], q[:, 1:], 0.0, True, scale=1.0)
        return bool((out == 2.0).all()) and torch.equal(lse.flatten(), q.flatten())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _is_plain(q: Tensor, v: Tensor, group: Group, rules: Rules) -> bool:
    """Whether the fused CPU kernel computes exactly this."""
    return (
        q.device.type == "cpu"
        and q.shape[2] == v.shape[2]
        and not rules.softcap
        and (not rules.window or rules.window >= group.length)
        and (rules.causal or group.lengths is None)
        and _has_grouped_cpu_kernel()
    )


def attention_forward_torch(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], rules: Rules) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv) to out (T, Hq, Dv) and lse (Hq, T); rows in no document get 0 and -inf."""
    T, Hq, _ = q.shape
    Hk, dtype = k.shape[1], wide_dtype(q.dtype)
    out, lse = q.new_empty(T, Hq, v.shape[2]), q.new_empty(T, Hq, dtype=dtype)
    if not _covers(bounds, T):
        out.zero_()
        lse.fill_(float("-inf"))
    for group in document_groups(bounds, q.device):
        if _is_plain(q, v, group, rules):
            og, lg = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(group.take(x).transpose(1, 2) for x in (q, k, v)), 0.0, rules.causal, scale=rules.scale
            )
            group.put(out, og.transpose(1, 2))
            group.put(lse, lg.transpose(1, 2))
            continue
        qg, kg, vg = (_heads_first(group.take(x), Hk, dtype) for x in (q, k, v))
        kg, vg = kg.squeeze(1), vg.squeeze(1)
        N, G, L, _ = qg.shape
        og, lg = qg.new_empty(N, G, L, vg.shape[2]), qg.new_empty(N, G, L, 1)
        for first, last in _blocks(L):
            low, high = rules.key_range(first, last, L)
            mask = rules.hidden(first, last, low, high, group.lengths, q.device)
            scores = _masked_scores(qg[:, :, first:last], kg[:, low:high], rules, mask)
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            product = torch.bmm(weights.view(N, -1, high - low), vg[:, low:high]).view(N, G, last - first, -1)
            og[:, :, first:last] = product.div_(total)
            lg[:, :, first:last] = total.log_().add_(top)
        group.put(out, _rows_first(og, group.batch))
        group.put(lse, _rows_first(lg, group.batch).squeeze(-1))
    return out, lse.t().contiguous()


def attention_backward_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    bounds: tuple[int, ...],
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; shapes as in the forward, dlse (Hq, T) or None."""
    Hk, dtype = k.shape[1], wide_dtype(q.dtype)
    make = torch.empty_like if _covers(bounds, q.shape[0]) else torch.zeros_like
    dq, dk, dv = make(q), make(k), make(v)
    delta: Tensor | None = None  # (T, Hq); the fused kernel makes its own
    for group in document_groups(bounds, q.device):
        if dlse is None and _is_plain(q, v, group, rules):
            dog, qg, kg, vg, og = (group.take(x).transpose(1, 2) for x in (dout, q, k, v, out))
            if group.lengths is not None:  # padded queries repeat the last row: they must not add to dk and dv
                dog = dog.masked_fill(~group.real()[:, None, :, None], 0.0)
            lg = group.take(lse.t()).transpose(1, 2)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dog, qg, kg, vg, og, lg, 0.0, rules.causal, scale=rules.scale
            )
            for into, grad in zip((dq, dk, dv), grads, strict=True):
                group.put(into, grad.transpose(1, 2))
            continue
        if delta is None:
            delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
            if dlse is not None:
                delta = delta - dlse.t().to(dtype)
        qg, kg, vg, dog, lg, deltag = (
            _heads_first(group.take(x), Hk, dtype) for x in (q, k, v, dout, lse.t().unsqueeze(-1), delta.unsqueeze(-1))
        )
        kg, vg = kg.squeeze(1), vg.squeeze(1)
        N, G, L, D = qg.shape
        if group.lengths is not None:  # as above
            unreal = (~group.real()).repeat_interleave(Hk, 0)[:, None, :, None]
            dog, deltag = dog.masked_fill(unreal, 0.0), deltag.masked_fill(unreal, 0.0)
        dqg, dkg, dvg = torch.empty_like(qg), torch.zeros_like(kg), torch.zeros_like(vg)
        for first, last in _blocks(L):
            low, high = rules.key_range(first, last, L)
            mask = rules.hidden(first, last, low, high, group.lengths, q.device)
            flat = (N, G * (last - first), -1)
            qb, dob = qg[:, :, first:last].reshape(flat), dog[:, :, first:last].reshape(flat)
            scores = _masked_scores(qg[:, :, first:last], kg[:, low:high], rules, mask)
            slope = 1 - (scores / rules.softcap).square() if rules.softcap else None
            weights = scores.sub_(lg[:, :, first:last]).exp_().view(flat)
            dvg[:, low:high].baddbmm_(weights.transpose(1, 2), dob)
            dscores = torch.bmm(dob, vg[:, low:high].transpose(1, 2))
            dscores.sub_(deltag[:, :, first:last].reshape(flat)).mul_(weights)
            if slope is not None:
                # hidden keys: 0 * -inf
                dscores.mul_(slope.view(flat)).masked_fill_(weights == 0, 0.0)
            dqg[:, :, first:last] = _scaled_product(dscores, kg[:, low:high], rules.scale).view(N, G, last - first, D)
            dkg[:, low:high].baddbmm_(dscores.transpose(1, 2), qb, alpha=rules.scale)
        group.put(dq, _rows_first(dqg, group.batch))
        group.put(dk, _rows_first(dkg.unsqueeze(1), group.batch))
        group.put(dv, _rows_first(dvg.unsqueeze(1), group.batch))
    return dq, dk, dv
