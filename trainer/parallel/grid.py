"""The grid of a run as one DeviceMesh: replicas x (shards x context), neighbouring ranks in one context.

grid = grid_of(recipe.parallel, world.world_size)
mesh = device_mesh(grid, "cuda")      # what FSDP2 shards over: weights are also sharded over the ranks of a context
context_group(mesh, grid)             # the ranks that divide this rank's batches
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..parallel_config import Grid

WEIGHTS = "shard_context"


def device_mesh(grid: Grid, device_type: str) -> DeviceMesh:
    """One dimension of shards, or replicas x shards (HSDP). Collective: it makes the process groups."""
    shards = grid.shards * grid.context
    sizes, names = ((shards,), (WEIGHTS,)) if grid.replicas == 1 else ((grid.replicas, shards), ("replicate", WEIGHTS))
    with unset_fake_temporarily():  # a mesh reads its ranks, also in a dry world (launcher/doctor/dry_world.py)
        return init_device_mesh(device_type, sizes, mesh_dim_names=names)


def context_group(mesh: DeviceMesh, grid: Grid) -> dist.ProcessGroup:
    """The ranks that divide this rank's batches. Collective."""
    with unset_fake_temporarily():
        parts = mesh._unflatten(WEIGHTS, (grid.shards, grid.context), ("shard", "context"))
        return parts["context"].get_group()


def arrived(x: Tensor) -> Tensor:
    """The plain result of a functional collective, once it is there."""
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x
