"""Experts of foreign models: which modules they are, and how evenly the tokens of a step were divided among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


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


class ExpertLoad:
    """Counts, while a model trains, how many tokens each expert of each layer gets, and how likely its router finds it.

    load, chance: Float64["layers experts"], sums over the tokens since `take` was called last; padding is not among them.
    """

    def __init__(self, causal: Any, body: nn.Module, experts: int) -> None:
        self.mask: Tensor | None = None  # Bool["tokens"]: those that count; None: nothing is counted now
        self._experts = experts
        self._load: dict[int, Tensor] = {}
        self._chance: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        for number, module in enumerate(expert_modules(body).values()):
            self._hooks.append(module.register_forward_pre_hook(partial(self._chosen, number), with_kwargs=True))
        recorder: Any = (getattr(causal, "_can_record_outputs", None) or {}).get("router_logits")
        # without a balance loss of its own, a model's routers need not be softmaxes (DeepSeek-V3's are not)
        if getattr(causal.config, "router_aux_loss_coef", None) is None or not hasattr(recorder, "target_class"):
            return
        routers = [module for module in body.modules() if isinstance(module, recorder.target_class)]
        for number, module in enumerate(routers):
            self._hooks.append(module.register_forward_hook(partial(self._routed, number, recorder.index)))

    def remove(self) -> None:
        """Count nothing from here on: what is compiled must not change Python's objects."""
        for hook in self._hooks:
            hook.remove()

    def _chosen(self, number: int, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        index = options["top_k_index"] if "top_k_index" in options else args[1]
        if self.mask is not None:
            weights = self.mask.double().repeat_interleave(index.shape[-1])
            counted = weights.new_zeros(self._experts).index_add_(0, index.flatten(), weights)
            self._load[number] = self._load[number] + counted if number in self._load else counted

    def _routed(self, number: int, place: int, module: nn.Module, args: Any, output: Any) -> None:
        if self.mask is not None:
            logits = (output[place] if isinstance(output, tuple) else output).detach().reshape(len(self.mask), -1)
            found = (logits.float().softmax(-1) * self.mask[:, None]).sum(0).double()
            self._chance[number] = self._chance[number] + found if number in self._chance else found

    def take(self, add: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """Figures since the last call; add: sums a list of numbers over all ranks. {} where nothing was counted.

        expert_load_max, expert_load_min: tokens of the busiest and the idlest expert of a layer over the mean of its experts.
        experts_idle: experts without a token. balance_loss: experts x sum over experts of (share of tokens that take it) x
        (mean probability of its router), over all layers as in transformers; the experts per token where all are alike.
        """
        if not self._load:
            return {}
        load, chance = self._summed(self._load, add), self._summed(self._chance, add) if self._chance else None
        self._load, self._chance = {}, {}
        even = load / load.mean(1, keepdim=True).clamp(min=1e-9)
        figures = {
            "expert_load_max": float(even.max()),
            "expert_load_min": float(even.min()),
            "experts_idle": float((load == 0).sum()),
        }
        if chance is not None and chance.shape == load.shape:
            tokens = chance.sum()  # of all layers: the probabilities of a token add up to 1
            figures["balance_loss"] = float(self._experts * (load.sum(0) / tokens * chance.sum(0) / tokens).sum())
        return figures

    def _summed(self, parts: dict[int, Tensor], add: Callable[[list[float]], list[float]]) -> Tensor:
        held = torch.stack([parts[number] for number in sorted(parts)]).cpu()
        return torch.tensor(add(held.flatten().tolist()), dtype=torch.float64).reshape(held.shape)
