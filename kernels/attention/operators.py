"""The torch operators of packed attention: torch, triton and hopper tiers, forward and backward, and their autograd.

block_forward and block_backward attend to a part of the keys, for attention that several calls make together.
An operator takes plain numbers, so here Rules and TileMap are taken apart (by the caller, `*rules`) and put together again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..eager import direct
from ..tensors import wide_dtype
from .rules import Rules
from .tile_map import TileMap, make_tile_map
from .tiles import HOPPER_FORWARD
from .torch_tier import attention_backward_torch, attention_forward_torch


@functools.cache
def _triton_tier() -> ModuleType:
    """Imported when it is first called: an import statement costs 2 us each time."""
    from . import triton_tier

    return triton_tier


@torch.library.custom_op("chatmill::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor | None,
    header: Sequence[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) and lse (Hq, T). tiles, header: of a TileMap; causal .. scale: Rules.

    impl: torch, triton, hopper, or hopper-fused, which differs in the backward only.
    """
    rules, impl = Rules(causal, window, softcap, scale), impl.removesuffix("-fused")
    if impl == "torch":
        return attention_forward_torch(q, k, v, _bounds(cu_seqlens), rules)
    tile_map = _tile_map(q, v, cu_seqlens, tiles, header, rules, impl)
    if impl == "hopper":
        from .hopper.forward import attention_forward_hopper

        return attention_forward_hopper(q, k, v, tile_map, rules)
    return _triton_tier().attention_forward_triton(q, k, v, tile_map, rules)


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, Hq = q.shape[:2]
    return q.new_empty(T, Hq, v.shape[2]), q.new_empty(Hq, T, dtype=wide_dtype(q.dtype))


@torch.library.custom_op("chatmill::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens: Tensor,
    tiles: Tensor | None,
    header: Sequence[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    rules, saved = Rules(causal, window, softcap, scale), (q, k, v, out, lse, dout, dlse)
    if impl == "torch":
        return attention_backward_torch(*saved, _bounds(cu_seqlens), rules)
    tile_map = _tile_map(q, v, cu_seqlens, tiles, header, rules, impl.removesuffix("-fused"))
    if impl == "hopper-fused":
        from .hopper.backward import attention_backward_hopper

        return attention_backward_hopper(*saved, tile_map, rules)
    return _triton_tier().attention_backward_triton(*saved, tile_map, rules)


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, tiles, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, tiles)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, tiles = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = _gradients(q, k, v, out, lse, dout, dlse, cu_seqlens, tiles, *ctx.options)
    return (dq, dk, dv, *(None,) * (2 + len(ctx.options)))


attention_forward.register_autograd(_differentiate, setup_context=_save)
attend = direct(attention_forward, _save, _differentiate)
_gradients = direct(attention_backward)
_block = direct(attention_forward)  # without autograd


def _bounds(cu_seqlens: Tensor) -> tuple[int, ...]:
    return tuple(cu_seqlens.tolist())


def _tile_map(
    q: Tensor, v: Tensor, cu_seqlens: Tensor, tiles: Tensor | None, header: Sequence[int], rules: Rules, impl: str
) -> TileMap:
    """The caller's tile map where it fits the tier, or one made here: reading cu_seqlens then waits for the GPU."""
    given = None if tiles is None else TileMap(tiles, tuple(header))
    if given is not None and (impl != "hopper" or given.config.forward == HOPPER_FORWARD[q.shape[2]]):
        return given
    head_dim = max(q.shape[2], v.shape[2])
    made = _made_map(_bounds(cu_seqlens), q.shape[0], head_dim, q.dtype, rules.window, rules.causal, q.device, impl)
    if made.data.is_cuda:
        _hold(made.data)
    return made


@functools.lru_cache(maxsize=32)
def _made_map(
    bounds: tuple[int, ...],
    T: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    causal: bool,
    device: torch.device,
    impl: str,
) -> TileMap:
    return make_tile_map(
        bounds, T, head_dim=head_dim, dtype=dtype, window=window or None, causal=causal, device=device, impl=impl
    ).to(device)


def _hold(tiles: Tensor) -> None:
    """The cache of tile maps may let go of one while a captured graph will still read it, or kernels of another stream do."""
    if torch.cuda.is_current_stream_capturing():
        _captured[tiles.data_ptr()] = tiles
    else:
        tiles.record_stream(torch.cuda.current_stream(tiles.device))


_captured: dict[int, Tensor] = {}


def block_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, rules: Rules, impl: str) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) and lse (Hq, T) over these keys alone, a part of all (ring attention); autograd does not see it.

    cu_seqlens: on the host it spares a wait for the GPU. impl: torch, triton or hopper (interface.block_impl).
    """
    out, lse = _block(q, k, v, cu_seqlens, None, (), *rules, impl)
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
    """Gradients of q, k and v through these keys. out, lse: over ALL keys, merged, so that exp(score - lse) is the weight.

    A row whose lse is +inf and whose dout is 0 gives none. Source: Liu et al., arXiv:2310.01889.
    """
    dq, dk, dv = _gradients(q, k, v, out, lse, dout, dlse, cu_seqlens, None, (), *rules, impl)
    return dq, dk, dv


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both; out (T, Hq, Dv) and lse (Hq, T) wide, lse finite. A row of more_lse -inf adds nothing."""
    total = torch.logaddexp(lse, more_lse)
    shares = (torch.exp(part - total).t()[..., None] for part in (lse, more_lse))
    return out * next(shares) + more_out * next(shares), total
