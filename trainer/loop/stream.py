"""The batches of one rank: the shuffled stream, and how steps take from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from chatmill.config import ConfigError

from ...data.stream import PackedBatch, PackedStream
from ..model.tile_maps import tile_map_maker
from .budget import stream_options
from .context import RunContext


def training_stream(run: RunContext, exclude: Mapping[int, frozenset[str]]) -> PackedStream:
    """The shuffled stream of this rank; on a GPU with the attention kernel's tile maps, made beside the batches."""
    recipe, world = run.recipe, run.world
    return PackedStream(
        run.mixture,
        stream_options(recipe, exclude, world.batches),
        **world.place(),
        annotate=tile_map_maker(run.config, recipe.kernels.attention, recipe.train.precision, world.device),
        pin=world.device.type == "cuda",
    )


def take(batches: Iterator[PackedBatch], count: int) -> list[PackedBatch]:
    """The micro-batches of the next step; none once an epoch or token budget is used up."""
    micro = list(islice(batches, count))
    if micro and len(micro) != count:
        raise ConfigError("the training stream ended inside a step")
    return micro


def overlong_figures(stream: PackedStream) -> dict[str, Any]:
    """What became of dialogues longer than a pack since this start; empty where there were none."""
    names = ("dialogues", "overlong", "truncated", "split", "dropped", "cut_inside_turn")
    return {"overlong": {name: stream.counts[name] for name in names}} if stream.counts["overlong"] else {}


def merged(exclude: Mapping[int, frozenset[str]], step: int, uids: frozenset[str]) -> dict[int, frozenset[str]]:
    """The exclusions, with more dialogues left out once `step` steps are done."""
    return {**exclude, step: exclude.get(step, frozenset()) | uids}
