"""Experts of foreign models: which modules they are, and how evenly the tokens of a step were divided among them."""

from __future__ import annotations

from torch import nn


def expert_modules(body: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold all routed experts of a layer, by name."""
    return {
        name: module
        for name, module in body.named_modules()
        if any(p.ndim == 3 for p in module.parameters(recurse=False)) and getattr(module, "num_experts", None)
    }


def experts_of(body: nn.Module) -> tuple[int, int]:
    """(routed experts of a layer, how many of them a token takes); (0, 0) for a dense model."""
    found = expert_modules(body)
    if not found:
        return 0, 0
    count = max(int(getattr(module, "num_experts")) for module in found.values())  # noqa: B009 (typed as a tensor)
    taken = [int(top) for module in body.modules() if isinstance(top := getattr(module, "top_k", None), int)]
    if not taken:
        named = (getattr(getattr(body, "config", None), name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk"))
        taken = [value for value in named if isinstance(value, int)]
    return count, min(count, max(taken, default=count))
