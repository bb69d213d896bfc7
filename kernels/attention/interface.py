"""Attention over packed chats: causal, grouped heads, sliding window, soft-cap; forward and backward.

    out[t] = sum_s softmax_s(cap(scale * q[t] . k[s])) v[s],   s in the same document as t, s <= t, t - s < window
    cap(x) = softcap * tanh(x / softcap)

Shapes: T tokens of all documents in one row, Hq query heads, Hk key/value heads (Hq a multiple of Hk), D and Dv channels.
`cu_seqlens` holds the document boundaries; nothing attends across one.
Method: Dao et al., FlashAttention-2, arXiv:2307.08691 and -3, arXiv:2407.08608; tiles are listed on the CPU (tile_map.py).
Tiers:  triton (triton_tier.py), hopper (hopper/), torch (torch_tier.py), flash-attn 2, 3 and 4, SDPA and FlexAttention
        (libraries.py); dispatch.py chooses.
Bench:  python -m chatmill.kernels.bench attention
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Obstacle, capability, choose, constant_in_graphs, import_problem, is_planning, why_no_triton
from .flash import FLASH
from .libraries import LIBRARIES, library_attention, why_not
from .operators import attend
from .reference import attention_reference
from .rules import Rules
from .tile_map import TileMap

# largest head dimension of the Triton kernels
MAX_HEAD_DIM = 256
HOPPER_MODULE = f"{__package__}.hopper.forward"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    tile_map: TileMap | None = None,
    max_seqlen: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool | None = None,
    complete: bool = False,
) -> Tensor:
    """Attention of packed documents: out (T, Hq, Dv). Rows past cu_seqlens[-1] give 0.

    q (T, Hq, D), k (T, Hk, D), v (T, Hk, Dv): any strides. cu_seqlens Int32 (S+1,): document boundaries, None: one document.
    window: tokens seen by a query, itself included. scale: default D ** -0.5.
    impl: auto, hopper, triton, flash2, flash3, flash4, flash (one of these), sdpa, flex, torch or reference.
    return_lse: return (out, lse), as attention_with_lse does.
    sinks (Hq,): one extra logit per head that takes weight and gives no value.
    tile_map: make_tile_map(...) of these cu_seqlens; max_seqlen: the longest document. Given by the data stream, they spare a
    wait for the GPU.
    deterministic: gradients bitwise equal from run to run; None: torch.are_deterministic_algorithms_enabled(). The triton and
    torch tiers' always are. The Hopper tier also has a backward of five matrix products instead of seven that is not: False
    allows it.
    complete: cu_seqlens[-1] is T, as in every batch of the data stream: the libraries' rows need no zeroing.
    """
    rules = Rules(causal, window or 0, softcap or 0.0, q.shape[-1] ** -0.5 if scale is None else float(scale))
    _check(q, k, v, cu_seqlens, window, softcap, rules.scale)
    # a condition, not its value: with a number of documents that varies, Dynamo has a symbol here, and _decide wants constants
    packed = True if cu_seqlens is not None and cu_seqlens.numel() > 2 else False  # noqa: SIM210
    needs_lse = return_lse or sinks is not None
    dtype = str(q.dtype).removeprefix("torch.")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    dims = q.shape[2], v.shape[2]
    impl = _decide(impl, str(q.device), dtype, *dims, rules.softcap > 0, needs_lse, deterministic, packed)
    if impl in LIBRARIES:  # none of them gives the log-sum-exp
        options = {"deterministic": deterministic, "complete": complete}
        return library_attention(impl, q, k, v, cu_seqlens, max_seqlen, rules, **options)
    if impl == "reference":
        shape: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
        out, lse = attention_reference(q, k, v, cu_seqlens=cu_seqlens, sinks=sinks, **shape)
    else:
        out, lse = _attention(q, k, v, cu_seqlens, tile_map, rules, impl, deterministic)
        if sinks is not None:
            out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out  # type: ignore[return-value]  # typed: attention_with_lse


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) of attention and lse (Hq, T), -inf in rows past cu_seqlens[-1]. options: those of attention."""
    out, lse = attention(q, k, v, return_lse=True, **options)
    return out, lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) and lse (Hq, T) with one more logit per head, sinks (Hq,), that takes weight and gives no value."""
    # softmax with one more column of value 0: out shrinks by exp(lse) / (exp(lse) + exp(sink))
    sink = sinks.to(lse.dtype)[:, None]
    inside = lse != -math.inf
    out = out * torch.where(inside, torch.sigmoid(lse - sink), 0.0).t()[..., None].to(out.dtype)
    return out, torch.where(inside, torch.logaddexp(lse, sink), lse)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    tile_map: TileMap | None,
    rules: Rules,
    impl: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """out and lse of the torch, triton or hopper tier."""
    if tile_map is not None:
        _check_tile_map(tile_map, q, rules)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    tiles, header = (None, ()) if tile_map is None or impl == "torch" else (tile_map.data, tile_map.header)
    if impl == "hopper" and _may_fuse(q.shape[2], rules.softcap, deterministic):
        impl = "hopper-fused"
    out, lse = attend(q, k, v, cu_seqlens, tiles, header, *rules, impl)
    return out, lse


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, softcap: float | None, scale: float
) -> None:
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"attention: q, k and v are (T, heads, channels); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0] or k.shape[1] != v.shape[1] or k.shape[2] != q.shape[2]:
        raise ValueError(f"attention: shapes do not agree: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}.")
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"attention: cu_seqlens is int32 (S+1,), starting with 0; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; a query sees at least itself: window >= 1, or None for no limit.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap={softcap}; it must be positive, or None.")
    if not scale > 0:
        raise ValueError(f"attention: scale={scale}; it must be positive.")


def _may_fuse(head_dim: int, softcap: float, deterministic: bool) -> bool:
    """Whether the Hopper tier takes its fused backward; a soft-cap at 128 channels does not fit into its registers."""
    return not deterministic and (not softcap or head_dim <= 64)


def _check_tile_map(tile_map: TileMap, q: Tensor, rules: Rules) -> None:
    made_for = (tile_map.tokens, tile_map.causal, tile_map.window or None)
    called_with = (q.shape[0], rules.causal, rules.window or None)
    if made_for != called_with:
        names = "T={}, causal={}, window={}"
        raise ValueError(
            f"attention: the tile map was made for {names.format(*made_for)}; this call has {names.format(*called_with)}. "
            "Make it with make_tile_map(...) for this call."
        )


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels cannot do a call; None where they can. head_dim: the larger of key and value channels."""
    if reason := why_no_triton(device):
        return reason
    if head_dim > MAX_HEAD_DIM:
        return f"head dimensions up to {MAX_HEAD_DIM}, not {head_dim}"
    return "no float64" if dtype == torch.float64 else None


def block_impl(impl: str, q: Tensor, v: Tensor, softcap: float) -> str:
    """The tier that computes the blocks of a call: one of our own, since the others give no log-sum-exp."""
    dtype = str(q.dtype).removeprefix("torch.")
    return _decide(impl, str(q.device), dtype, q.shape[2], v.shape[2], softcap > 0, True, True, True)


@constant_in_graphs
def _decide(
    impl: str,
    device: str,
    dtype: str,
    head_dim: int,
    value_dim: int,
    softcap: bool,
    needs_lse: bool,
    deterministic: bool,
    packed: bool,
) -> str:
    """Implementation by dispatch's table; plain arguments, so that torch.compile takes the answer as a constant."""
    where, kind = torch.device(device), getattr(torch, dtype)
    asked: dict[str, Any] = {"softcap": softcap, "needs_lse": needs_lse, "deterministic": deterministic}
    obstacles: dict[str, Obstacle] = {
        name: functools.partial(why_not, name, where, kind, head_dim, value_dim, **asked) for name in LIBRARIES
    }
    obstacles |= {
        "triton": functools.partial(why_not_triton, where, kind, max(head_dim, value_dim)),
        "hopper": functools.partial(_why_no_hopper, where, kind, head_dim, value_dim),
        "torch": None,
        "reference": None,
    }
    if impl == "flash":
        reasons = {name: why_not(name, where, kind, head_dim, value_dim, **asked) for name in FLASH}
        impl = next((name for name in FLASH if reasons[name] is None), "flash")
        obstacles["flash"] = "; ".join(dict.fromkeys(filter(None, reasons.values())))
    return choose("attention", impl, where, obstacles, packed=packed)


def _why_no_hopper(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    if reason := why_not_triton(device, dtype, max(head_dim, value_dim)):
        return reason
    if device.type != "cuda" and not is_planning():
        return "the Hopper tier runs only on a Hopper GPU: Triton's interpreter has no Gluon"
    if device.type == "cuda" and not 90 <= capability(device) < 100:
        return f"the Hopper tier needs compute capability 90, this GPU has {capability(device)}"
    if reason := import_problem(HOPPER_MODULE, "why_not_hopper"):  # Gluon's names change between releases of triton
        return reason
    from .hopper.forward import why_not_hopper

    return why_not_hopper(dtype, head_dim, value_dim)
