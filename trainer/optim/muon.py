"""Muon: momentum, orthogonalised by Newton-Schulz, for the matrices of the layers; AdamW for everything else.

    B = momentum B + (1 - momentum) g          U = (1 - momentum) g + momentum B   (nesterov; else U = B)
    O = NS(U), which moves every singular value of U towards 1
    W = W (1 - lr decay) - lr scale O          scale = 0.2 sqrt(max(m, n))  or  sqrt(max(1, m / n))

NS needs the whole matrix (m x n). Where several processes hold it, each of them orthogonalises a share of the matrices and no
two do the same work:
- sharded by rows (FSDP2): one all-to-all brings world-size matrices of one shape to one owner each, another returns the
  results;
- replicated (DDP): every rank works on its share, an all-gather gives the results to all.
torch.optim.Muon has the same mathematics for one process, in bf16 and one matrix at a time; the tests compare with it.
Sources: Jordan et al., kellerjordan.github.io/posts/muon; Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ..checkpoint.sharding import local_of
from ..config import MuonSection

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan et al.: steep at 0, singular values end in about 0.7 .. 1.2
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon over `groups`, together with an AdamW over the rest; both share one list of groups and one state.

    dtype: of the Newton-Schulz iterations and of what is sent for them; momentum and weights stay fp32.
    copies: the processes that hold equal copies of the weights (DDP); None if they are sharded or held once.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        adamw: torch.optim.AdamW | None,
        section: MuonSection,
        *,
        lr: float,
        dtype: torch.dtype,
        copies: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.section, self.dtype, self.copies = section, dtype, copies
        self.matrix_groups = list(self.param_groups)
        self.adamw = adamw
        if adamw is not None:
            adamw.state = self.state  # the same dict, and below the same group dicts: a rate set here is set there too
            self.param_groups = [*self.matrix_groups, *adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; collective where parameters are shared among processes."""
        assert closure is None
        for group in self.matrix_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = self._momentum(parameters)
            for parameter, update in zip(parameters, self._orthogonal(parameters, updates), strict=True):
                rows, columns = parameter.shape
                self._apply(local_of(parameter), update, rows, columns, group)
        if self.adamw is not None:
            self.adamw.step()

    def _apply(self, local: Tensor, update: Tensor, rows: int, columns: int, group: Mapping[str, Any]) -> None:
        """Decay this rank's elements of a rows x columns matrix and take the step O, of which it has the same elements."""
        spectral = self.section.scale == "spectral"
        size = math.sqrt(max(1.0, rows / columns)) if spectral else 0.2 * math.sqrt(max(rows, columns))
        local.mul_(1 - group["lr"] * group["weight_decay"])
        local.add_(update.to(local.device, local.dtype).view_as(local), alpha=-group["lr"] * size)

    def _momentum(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Local shards of U, fp32."""
        grads, buffers = [], []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            grads.append(local_of(parameter.grad))
            buffers.append(local_of(state["momentum_buffer"]))
        if not parameters:
            return []
        torch._foreach_lerp_(buffers, grads, 1 - self.section.momentum)
        if not self.section.nesterov:
            return buffers
        return list(torch._foreach_lerp(grads, buffers, self.section.momentum))

    def _orthogonal(self, parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
        """NS of each U, sharded as the parameters; matrices of one shape are done together."""
        done: dict[int, Tensor] = {}
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, parameter in enumerate(parameters):
            alike.setdefault(tuple(parameter.shape), []).append(i)
        for shape, members in alike.items():
            first = parameters[members[0]]
            group, sharded = _sharing(first, self.copies)
            device = torch.device(first.device_mesh.device_type) if isinstance(first, DTensor) else first.device
            width = dist.get_world_size(group) if group is not None else len(members)
            for at in range(0, len(members), width):
                chosen = members[at : at + width]
                pieces = [updates[i].to(device, self.dtype) for i in chosen]
                if group is None:
                    results = list(newton_schulz(torch.stack(pieces), self.section.iterations))
                elif sharded:
                    held = [rows * shape[1] for rows in shard_rows(shape[0], width)]  # of each rank, for every matrix alike
                    results = by_owner(pieces, [held] * len(pieces), shape, self.section.iterations, group)
                else:
                    results = self._by_share(pieces, group)
                done |= dict(zip(chosen, results, strict=True))
        return [done[i] for i in range(len(parameters))]

    def _by_share(self, pieces: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
        """Replicated matrices, at most one per rank: each rank computes its own, and all are gathered."""
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        mine = torch.zeros_like(pieces[0])
        if rank < len(pieces):
            mine = newton_schulz(pieces[rank][None], self.section.iterations)[0]
        gathered = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(gathered, mine, group=group)
        return gathered[: len(pieces)]


def by_owner(
    pieces: Sequence[Tensor],
    lengths: Sequence[Sequence[int]],
    shape: Sequence[int],
    iterations: int,
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """This rank's pieces of NS of at most world-size matrices of one shape: matrix i goes whole to rank i and comes back.

    pieces: this rank's elements of each matrix, flattened in order. lengths: elements of each matrix (rows) on each rank.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.cat([piece.reshape(-1) for piece in pieces])
    sent = [held[rank] for held in lengths] + [0] * (world - len(lengths))
    assert mine.numel() == sum(sent), (mine.shape, shape, lengths)
    received = list(lengths[rank]) if rank < len(lengths) else [0] * world
    whole = mine.new_empty(sum(received))
    dist.all_to_all_single(whole, mine, received, sent, group=group)
    if rank < len(lengths):
        whole = newton_schulz(whole.view(1, *shape), iterations).reshape(-1)
    back = torch.empty_like(mine)
    dist.all_to_all_single(back, whole, sent, received, group=group)
    return list(back.split(sent[: len(lengths)]))


def newton_schulz(matrices: Tensor, iterations: int) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of the given ones: Float["N m n"], in their own dtype."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x.float()).clamp(min=EPS)[:, None, None].to(x.dtype)  # singular values below 1
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


def shard_rows(rows: int, world: int) -> list[int]:
    """Rows that each rank holds of a matrix sharded along its first dimension, as DTensor cuts it."""
    size = -(-rows // world)
    return [max(0, min(size, rows - i * size)) for i in range(world)]


def _sharing(parameter: Tensor, copies: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup | None, bool]:
    """The processes among which a matrix is shared, and whether in shards (else in copies). None: this one alone."""
    if isinstance(parameter, DTensor):
        for dimension, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                assert placement.dim == 0, placement
                return parameter.device_mesh.get_group(dimension), True
        return None, False
    return copies, False
