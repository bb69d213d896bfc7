"""flash-attn 2, 3 and 4: three packages, each with limits of its own, behind one call.

    why_not_flash("flash3", device, dtype, 128, 128, deterministic=True)    # None, or why it cannot do this call
    flash_attention("flash3", q, k, v, cu_seqlens, max_seqlen, rules, deterministic=True)

A version counts as installed once it was imported and its function was found: a wheel that was built for another torch fails by
its symbols, and flash-attn 2 carries a `flash_attn.cute` without its needs. The limits are those of Dao-AILab/flash-attention
in August 2026: csrc/flash_attn/flash_api.cpp (2), hopper/flash_api.cpp (3), flash_attn/cute/interface.py (4).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import capability, import_problem
from .rules import Rules

FLASH = ("flash3", "flash4", "flash2")  # the order in which `flash` takes them
FUNCTION = "flash_attn_varlen_func"


class FlashVersion(NamedTuple):
    """modules: where its function lies, by release. package: what to install. low, high: compute capabilities."""

    modules: tuple[str, ...]
    package: str
    low: int
    high: int


VERSIONS = {
    "flash2": FlashVersion(("flash_attn",), "flash-attn", 80, 129),
    "flash3": FlashVersion(("flash_attn_interface", "flash_attn_3.flash_attn_interface"), "flash-attn-3", 90, 99),
    "flash4": FlashVersion(("flash_attn.cute",), "flash-attn-4", 90, 129),
}


def flash_module(name: str) -> tuple[str | None, str]:
    """The module that holds a version's packed attention, or None and why there is none."""
    version, problems = VERSIONS[name], []
    for module in version.modules:
        problem = import_problem(module, FUNCTION)
        if not problem:
            return module, ""
        problems.append(problem)
    broken = [problem for problem in problems if not problem.endswith("is not installed")]
    return None, broken[0] if broken else f"{version.package} is not installed"


def why_not_flash(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, *, softcap: bool, deterministic: bool
) -> str | None:
    """Why this version cannot do a call; None where it can. The package is imported only where the rest fits."""
    version, number = VERSIONS[name], capability(device)
    if not version.low <= number <= version.high:
        there = f"this one has {number}" if number else f"not a {device.type} device"
        return f"{version.package} needs a CUDA GPU of capability {version.low} to {version.high}, {there}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{version.package} takes bf16 and fp16, not {dtype}"
    if head_dim != value_dim or head_dim > 256 or head_dim % 8:
        return f"{version.package} takes equal head dimensions up to 256 in steps of 8, not {head_dim} and {value_dim}"
    if name == "flash3" and deterministic and head_dim > 192:
        return f"flash-attn-3 has no deterministic backward for {head_dim} channels"
    if name == "flash4" and (reason := _why_not_flash4(number, head_dim, softcap, deterministic)):
        return reason
    return flash_module(name)[1] or None


def _why_not_flash4(number: int, head_dim: int, softcap: bool, deterministic: bool) -> str | None:
    if number >= 120:
        if deterministic:
            return f"flash-attn-4 has no deterministic backward on capability {number}"
        if softcap:
            return f"flash-attn-4 has no backward with a soft-cap on capability {number}"
    elif number >= 100:
        if 128 < head_dim < 256:
            return f"flash-attn-4 takes head dimensions up to 128, and 256, on capability {number}; not {head_dim}"
        if softcap and head_dim == 256:
            return f"flash-attn-4 has no soft-cap for 256 channels on capability {number}"
    return None


def flash_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, rules: Rules, *, deterministic: bool
) -> Tensor:
    """out (T, Hq, Dv) of packed q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv). Rows past cu_seqlens[-1] hold anything."""
    module, why = flash_module(name)
    if module is None:
        raise ValueError(f"attention: {why}.")
    function = getattr(importlib.import_module(module), FUNCTION)
    options: dict[str, Any] = {"softmax_scale": rules.scale, "causal": rules.causal}
    if rules.window:
        options["window_size"] = (rules.window - 1, 0 if rules.causal else rules.window - 1)
    if rules.softcap:
        options["softcap"] = rules.softcap
    if deterministic:
        options["deterministic"] = True
    unknown = set(options) - _keywords(function)
    if unknown:
        package, missing = VERSIONS[name].package, ", ".join(sorted(unknown))
        raise ValueError(f"attention: the installed {package} does not take {missing}; install a newer one.")
    bounds = cu_seqlens.to(device=q.device, dtype=torch.int32)
    out = function(
        q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, **options
    )
    return out[0] if isinstance(out, tuple) else out  # versions 3 and 4 have returned the log-sum-exp too


@functools.lru_cache(maxsize=8)
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
