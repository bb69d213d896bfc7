"""What the backward pass keeps of a layer, and what it computes again, where activations are checkpointed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recompute = Literal["none", "full", "selective"]

# What selective checkpointing keeps: the quadratic part of a layer, in every tier of the attention.
ATTENTION_OPS = frozenset(
    {
        torch.ops.chatmill.attention_forward.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)


def keep_attention() -> Any:
    """Contexts for torch's checkpoint that keep the attention's result."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in ATTENTION_OPS or getattr(op, "namespace", "") in ("flash_attn", "flash_attn_3")
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
