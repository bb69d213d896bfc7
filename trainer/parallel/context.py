"""Ranks that divide their batches: how they attend together, and add up what each of them has.

    decoder.context = join_context(recipe, config, mesh)     None where every rank has batches of its own
    decoder.context.sum(x)                                   a differentiable sum over these ranks

Two ways to attend over tokens that lie on C ranks (docs/context-parallelism.md): `ulysses` exchanges heads (ulysses.py), `ring`
passes keys and values around (ring.py). Everything else of a layer works on each token alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from chatmill.config import ConfigError

from ...data.stream import Division
from ...kernels.attention import TileMap
from ...kernels.attention.interface import with_sinks
from ..config import Recipe
from ..foreign_config import ForeignConfig
from ..model_config import ModelConfig
from ..parallel_config import grid_of
from .grid import arrived, context_group
from .ring import ring_attention
from .ulysses import ulysses_attention

Method = Literal["ulysses", "ring"]
OWN_TIERS = ("auto", "torch", "triton", "hopper")


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that divide the same batches. rank: this one's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int
    method: Method

    def sum(self, x: Tensor) -> Tensor:
        """The sum over these ranks, on each of them; so are the gradients that go back. Collective."""
        return _Sum.apply(x, self.group)


class SharedBatch(NamedTuple):
    """One batch among the ranks that divide it, for every layer. positions Int["T/C"]."""

    ranks: ContextGroup
    division: Division
    positions: Tensor

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        impl: str,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        tile_map: TileMap | None = None,
        max_seqlen: int | None = None,
        complete: bool = True,
    ) -> Tensor:
        """As kernels.attention, with this rank's tokens: q (T/C, Hq, D), all heads. Collective.

        cu_seqlens, tile_map, max_seqlen: of the whole batch.
        """
        ranks = self.ranks
        rules: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
        if ranks.method == "ulysses":
            whole: dict[str, Any] = {"cu_seqlens": cu_seqlens, "tile_map": tile_map, "max_seqlen": max_seqlen}
            if sinks is not None:
                whole["sinks"] = sinks.chunk(ranks.size)[ranks.rank]
            return ulysses_attention(q, k, v, ranks.group, ranks.size, impl=impl, complete=complete, **rules, **whole)
        out, lse = ring_attention(q, k, v, self.positions, self.division.ring, ranks.group, impl=impl, **rules)
        return out if sinks is None else with_sinks(out, lse, sinks)[0]


class _Sum(torch.autograd.Function):
    """Every rank computes the same from the sum; the one that counts decides the gradient, so gradients are added too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _added(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _added(gradient, ctx.group), None


def _added(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return arrived(collectives.all_reduce(x, "sum", group))


def join_context(recipe: Recipe, config: ModelConfig, mesh: DeviceMesh) -> ContextGroup | None:
    """The ranks that divide this rank's batches; None where it has its own. Collective. Raises ConfigError."""
    grid = grid_of(recipe.parallel, mesh.size())
    if grid.context == 1:
        return None
    group = context_group(mesh, grid)
    return ContextGroup(group, dist.get_rank(group), grid.context, context_method(recipe, config))


def context_method(recipe: Recipe, config: ModelConfig) -> Method:
    """How the ranks of a context attend together. Raises ConfigError where they cannot in the way that was asked for."""
    size, asked, tier = recipe.parallel.context, recipe.parallel.context_method, recipe.kernels.attention
    divides = config.heads % size == 0
    if isinstance(config, ForeignConfig):
        raise ConfigError(
            f"parallel.context={size} is not supported with {config.name}: only the layers of our own decoder attend over "
            "tokens of several processes.\nLeave parallel.context out."
        )
    if asked == "ulysses" and not divides:
        raise ConfigError(
            f"parallel.context_method=ulysses gives every process the same number of heads: context={size} does not divide "
            f"the model's {config.heads}.\nUse context_method=ring, or a context that divides {config.heads}."
        )
    method: Method = "ulysses" if asked == "ulysses" or (asked == "auto" and divides) else "ring"
    if method == "ring" and tier not in OWN_TIERS:
        raise ConfigError(
            f"kernels.attention={tier} gives no log-sum-exp, which parallel.context_method=ring needs.\n"
            f"Use one of {', '.join(OWN_TIERS)}" + (", or context_method=ulysses." if divides else ".")
        )
    return method
