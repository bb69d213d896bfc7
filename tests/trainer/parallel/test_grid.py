"""The grid of processes: what a recipe asks for, checked in words against how many were started."""

from __future__ import annotations

from typing import Any

import pytest

from chatmill.config import ConfigError, validate
from chatmill.trainer.config import Recipe
from chatmill.trainer.distributed.accelerate import check_accelerate
from chatmill.trainer.distributed.world import check_launch
from chatmill.trainer.foreign_config import ForeignConfig
from chatmill.trainer.model_config import ModelConfig
from chatmill.trainer.parallel.context import context_method
from chatmill.trainer.parallel_config import Grid, ParallelSection, grid_of


def parallel(**fields: Any) -> ParallelSection:
    return ParallelSection.model_validate({"strategy": "fsdp2", **fields})


@pytest.mark.parametrize(
    ("fields", "processes", "grid"),
    [
        ({}, 4, Grid(1, 4, 1)),
        ({"replicas": 2}, 4, Grid(2, 2, 1)),
        ({"context": 2}, 8, Grid(1, 4, 2)),
        ({"context": 2, "shards": 2, "replicas": 2}, 8, Grid(2, 2, 2)),
        ({"strategy": "ddp", "context": 2}, 8, Grid(4, 1, 2)),
        ({"strategy": "zero2", "context": 2}, 4, Grid(1, 2, 2)),
        ({"strategy": "single"}, 1, Grid(1, 1, 1)),
    ],
)
def test_the_grid_of_a_recipe(fields: dict[str, Any], processes: int, grid: Grid) -> None:
    assert grid_of(parallel(**fields), processes) == grid
    assert grid.replicas * grid.shards * grid.context == processes


@pytest.mark.parametrize(
    ("fields", "processes", "words"),
    [
        ({"context": 3}, 4, "context=3 does not divide the 4 processes of this run"),
        ({"context": 2, "replicas": 3}, 8, r"replicas=3 does not divide the 8 processes of this run / context=2: 4 / 3"),
        ({"shards": 2, "context": 2}, 8, "shards=2 x context=2 = 4 processes, but 8 were started"),
    ],
)
def test_processes_that_do_not_make_the_grid_are_refused(fields: dict[str, Any], processes: int, words: str) -> None:
    recipe = Recipe.model_validate({"parallel": {"strategy": "fsdp2", **fields}, "data": {"sequence_length": 1020}})
    with pytest.raises(ConfigError, match=words):
        check_launch(recipe, {"RANK": "0", "WORLD_SIZE": str(processes)})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"strategy": "single", "context": 2}}, "context=2 needs as many processes: single is one"),
        ({"parallel": {"strategy": "ddp", "shards": 2}}, "shards and reshard_after_forward belong to strategy=fsdp2"),
        ({"parallel": {"strategy": "ddp", "context": 3}}, "sequence_length=1024 is not a multiple of parallel.context=3"),
        ({"parallel": {"strategy": "fsdp2", "tensor": 2}}, "tensor"),
    ],
)
def test_recipes_that_cannot_be_laid_out_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(Recipe, sections, "recipe")


def test_heads_are_exchanged_where_the_context_divides_them() -> None:
    def method(heads: int, attention: str = "auto", **fields: Any) -> str:
        sections = {"parallel": {"strategy": "ddp", "context": 4, **fields}, "kernels": {"attention": attention}}
        return context_method(Recipe.model_validate(sections), ModelConfig(heads=heads, kv_heads=1, hidden_size=heads * 8))

    assert (method(8), method(6), method(8, context_method="ring")) == ("ulysses", "ring", "ring")
    assert method(8, "flash3") == "ulysses"
    with pytest.raises(ConfigError, match="context=4 does not divide the model's 6"):
        method(6, context_method="ulysses")
    with pytest.raises(ConfigError, match="flash3 gives no log-sum-exp"):
        method(6, "flash3")


def test_a_model_of_transformers_is_refused() -> None:
    foreign = ForeignConfig(source={"model_type": "opt"}, table_names=("embed",), parts={"embedding": 1})
    with pytest.raises(ConfigError, match="context=2 is not supported with opt of transformers"):
        context_method(Recipe.model_validate({"parallel": {"strategy": "ddp", "context": 2}}), foreign)


def test_the_parallelism_config_of_accelerate_is_understood_where_it_says_the_same() -> None:
    recipe = Recipe.model_validate({"parallel": {"strategy": "fsdp2", "context": 2, "replicas": 2}})
    environment = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "WORLD_SIZE": "8"}
    sizes = {"DP_REPLICATE_SIZE": "2", "DP_SHARD_SIZE": "2", "CP_SIZE": "2", "SP_SIZE": "1", "TP_SIZE": "1"}
    check_accelerate(recipe, environment | {f"PARALLELISM_CONFIG_{name}": value for name, value in sizes.items()})
    exchanged = sizes | {"CP_SIZE": "1", "SP_SIZE": "2"}
    check_accelerate(recipe, environment | {f"PARALLELISM_CONFIG_{name}": value for name, value in exchanged.items()})
    for name, value in (("CP_SIZE", "4"), ("TP_SIZE", "2"), ("DP_REPLICATE_SIZE", "1")):
        with pytest.raises(ConfigError, match="parallelism config and the recipe disagree"):
            check_accelerate(
                recipe, environment | {f"PARALLELISM_CONFIG_{key}": word for key, word in (sizes | {name: value}).items()}
            )
