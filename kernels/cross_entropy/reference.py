"""The slow truth of the linear cross-entropy, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import wide_dtype
from .rows import LossMetrics, Reduction


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """Loss and metrics by the formula of interface.py: all logits, autograd's own gradients, no row skipped."""
    logits = (hidden @ weight.to(hidden.dtype).T).to(wide_dtype(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = targets != ignore_index
    exists = (targets >= 0) & (targets < logits.shape[1])
    labels = torch.where(exists, targets, 0).to(torch.int64)[:, None]
    lse = torch.logsumexp(logits, dim=1)
    own = logits.gather(1, labels)
    losses = (1 - label_smoothing) * (lse - own.squeeze(1)) + label_smoothing * (lse - logits.mean(1)) + z_loss * lse**2
    losses = torch.where(valid, torch.where(exists, losses, float("inf")), 0.0)
    weighted = losses if token_weights is None else losses * torch.where(valid, token_weights.detach(), 0.0)
    count = valid.sum()
    loss = weighted
    if reduction != "none":
        loss = weighted.sum()
    if reduction == "mean":
        loss = loss / (count.clamp(min=1) if normalizer is None else normalizer)
    with torch.no_grad():
        rivals = logits.scatter(1, labels, float("-inf"))
        hits = exists & (own.squeeze(1) > rivals.amax(1))
    return loss, LossMetrics(torch.where(valid, lse, 0.0).detach(), (hits & valid).sum(), count, losses.detach())
