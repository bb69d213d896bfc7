"""`parallel.*` of a recipe: the engine, and the grid of processes that it runs on.

    processes = replicas x shards x context        neighbouring ranks first share a context, then a model

Imports neither torch nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from chatmill.config import ConfigError, Section

Strategy = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


class ParallelSection(Section):
    """The engine. `single` refuses to run as one of several processes; the others refuse to run alone.

    replicas: fsdp2 only: copies of the model, each sharded over the processes that are left (HSDP, one copy per node).
    shards: fsdp2 only: groups of processes that one copy is sharded over (null: world size / (replicas x context)).
    context: so many neighbouring processes divide every batch, token by token, and attend together. Weights are sharded over
    them as over others.
    context_method: `ulysses` (each process attends with some of the heads), `ring` (keys and values go around), or `auto`:
    ulysses where context divides the heads.
    reshard_after_forward: fsdp2 only: free the gathered weights between forward and backward (false: more memory, fewer
    gathers; a number: keep them sharded over that many processes).
    offload: where shards wait: `cpu` (fsdp2: parameters, gradients and optimizer; zero1, zero2: optimizer; zero3: both) or
    `nvme` (zero3), in the folder nvme_path of every node.
    """

    strategy: Strategy = "single"
    replicas: int = Field(default=1, gt=0)
    shards: int | None = Field(default=None, gt=0)
    context: int = Field(default=1, gt=0)
    context_method: Literal["auto", "ulysses", "ring"] = "auto"
    reshard_after_forward: bool | int = True
    offload: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None

    @model_validator(mode="after")
    def _check_strategy(self) -> ParallelSection:
        strategy, offload = self.strategy, self.offload
        if strategy != "fsdp2" and (self.replicas != 1 or self.shards is not None or self.reshard_after_forward is not True):
            raise ValueError(f"replicas, shards and reshard_after_forward belong to strategy=fsdp2, not {strategy}")
        if self.context > 1 and strategy == "single":
            raise ValueError(f"context={self.context} needs as many processes: single is one; set strategy=fsdp2 or ddp")
        if offload == "cpu" and strategy in ("single", "ddp"):
            raise ValueError(f"strategy={strategy} has no offload: use fsdp2, zero1, zero2 or zero3")
        if offload == "nvme" and strategy != "zero3":
            raise ValueError(f"offload=nvme needs strategy=zero3, not {strategy}")
        if (offload == "nvme") != (self.nvme_path is not None):
            raise ValueError("offload=nvme and nvme_path (a folder on a local disk) belong together")
        return self


@dataclass(frozen=True)
class Grid:
    """Processes by what they share. replicas x shards of them, with other data each; context of them divide every batch."""

    replicas: int
    shards: int
    context: int

    @property
    def batches(self) -> int:
        """Batches that are trained at the same time: groups of processes with the same data."""
        return self.replicas * self.shards


def grid_of(parallel: ParallelSection, world_size: int) -> Grid:
    """The grid of a recipe in a world of so many processes. Raises ConfigError where they do not make one."""
    context = parallel.context
    if world_size % context:
        raise ConfigError(
            f"parallel.context={context} does not divide the {world_size} processes of this run.\n"
            f"Start a multiple of {context}, or choose a context that divides {world_size}."
        )
    groups = world_size // context
    if parallel.strategy != "fsdp2":
        sharded = parallel.strategy.startswith("zero")
        return Grid(1 if sharded else groups, groups if sharded else 1, context)
    replicas, beside = parallel.replicas, f" / context={context}" if context > 1 else ""
    if groups % replicas:
        raise ConfigError(
            f"parallel.replicas={replicas} does not divide the {world_size} processes of this run{beside}: "
            f"{groups} / {replicas} is not a whole number."
        )
    shards = parallel.shards or groups // replicas
    if replicas * shards != groups:
        product = f"replicas={replicas} x shards={shards} x context={context}"
        raise ConfigError(
            f"parallel: {product} = {replicas * shards * context} processes, but {world_size} were started.\n"
            f"Start {replicas * shards * context}, or leave parallel.shards out: it is then {groups // replicas}."
        )
    return Grid(replicas, shards, context)
