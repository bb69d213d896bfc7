"""Every shipped recipe loads, describes the model it names, and can be built, planned and exported."""

from __future__ import annotations

import pytest
import yaml

from chatmill.config import ConfigError, dump_yaml, validate
from chatmill.trainer.config import RECIPES, Recipe, load_recipe
from chatmill.trainer.convert.hf_config import read_hf_config, write_hf_config
from chatmill.trainer.convert.names import parameter_shapes

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PUBLISHED = {"360m": 361_821_120, "1b": 1_235_814_400, "1b-long": 1_235_814_400, "8b": 8_030_261_248}


def test_the_sizes_of_the_plan_are_all_there() -> None:
    assert {"smollm2-135m", "360m", "1b", "8b", "1b-long", "tiny", "demo"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_and_its_dump_loads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert name.startswith(recipe.run.name)  # demo and demo-gpu write to the same run
    assert validate(Recipe, yaml.safe_load(dump_yaml(recipe)), name) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_of_a_recipe_builds_and_counts_right(name: str) -> None:
    config = load_recipe(name).model.shape()
    total = sum(shape.numel() for shape in parameter_shapes(config).values())
    assert total == config.parameter_counts()["total"]


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_a_named_size_has_the_published_number_of_parameters(name: str, total: int) -> None:
    assert load_recipe(name).model.shape().parameter_counts()["total"] == total


@pytest.mark.parametrize("name", NAMES)
def test_the_model_of_a_recipe_has_a_hugging_face_counterpart(name: str) -> None:
    config = load_recipe(name).model.shape()
    assert read_hf_config(write_hf_config(config, "bfloat16"), name) == config


def test_the_long_recipe_really_is_long() -> None:
    recipe = load_recipe("1b-long")
    assert recipe.data.sequence_length >= 32768
    assert recipe.model.rope_scaling is not None
    assert recipe.train.activation_checkpointing


def test_a_recipe_takes_a_yarn_override() -> None:
    words = [
        "model.checkpoint=null",
        "model.context=32768",
        "model.rope_scaling={kind: yarn, factor: 4, original_context: 8192}",
    ]
    scaling = load_recipe("1b-long", words).model.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("yarn", 4.0)


def test_an_override_beyond_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"exceeds model\.context"):
        load_recipe("360m", ["data.sequence_length=16384"])
