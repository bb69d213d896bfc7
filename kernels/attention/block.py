"""Causal attention to a part of the keys, for attention that several calls make together (ring attention).

    out, lse = block_forward(q, k, v, cu_seqlens, rules, impl)          of these keys alone; autograd does not see it
    softmax over all keys: merge(out, lse, more_out, more_lse), in fp32
    dq, dk, dv = block_backward(q, k, v, out, lse, dout, dlse, ...)     out, lse: of ALL keys, merged

With the merged lse, exp(score - lse) is the weight among all keys, so that each block gives its part of the gradients.
Shapes and rules as in interface.py; impl: torch, triton or hopper, as block_impl chose it.
Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv:2310.01889.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..eager import direct
from .interface import decide
from .operators import attention_backward, attention_forward
from .rules import Rules

_forward, _backward = direct(attention_forward), direct(attention_backward)


def block_impl(impl: str, q: Tensor, v: Tensor, softcap: float) -> str:
    """The tier that computes the blocks of a call: one of our own, since the others give no log-sum-exp."""
    dtype = str(q.dtype).removeprefix("torch.")
    return decide(impl, str(q.device), dtype, q.shape[2], v.shape[2], softcap > 0, True, True, True)


def block_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, rules: Rules, impl: str) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) and lse (Hq, T). cu_seqlens: on the host it spares a wait for the GPU."""
    out, lse = _forward(q, k, v, cu_seqlens, None, (), *rules, impl)
    return out, lse


def block_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens: Tensor,
    rules: Rules,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through these keys. A row whose lse is +inf and whose dout is 0 gives none."""
    dq, dk, dv = _backward(q, k, v, out, lse, dout, dlse, cu_seqlens, None, (), *rules, impl)
    return dq, dk, dv


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both; out (T, Hq, Dv) and lse (Hq, T) wide, lse finite. A row of more_lse -inf adds nothing."""
    total = torch.logaddexp(lse, more_lse)
    shares = (torch.exp(part - total).t()[..., None] for part in (lse, more_lse))
    return out * next(shares) + more_out * next(shares), total
