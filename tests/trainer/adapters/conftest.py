"""A small base model as a checkpoint, and runs of an adapter on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.trainer.adapters.prepare import prepare
from chatmill.trainer.adapters.sources import AdaptedSource, NewAdapter
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from chatmill.trainer.checkpoint.sharding import TensorSource
from chatmill.trainer.config import Recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.choose import build_engine
from chatmill.trainer.engine.engine import Engine
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.model_config import ModelConfig

from ..engine.engine_worker import recipe_for

SHAPE = ModelConfig(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=128,
    layers=2,
    heads=4,
    kv_heads=2,
    context=256,
    tied_embeddings=False,
    initializer_range=0.06,
)


def write_base(path: Path, data: Path, seed: int = 0, config: ModelConfig = SHAPE) -> Path:
    """A checkpoint with random weights and the data set's tokenizer."""
    model = Decoder(config)
    model.init_weights(seed)
    with CheckpointWriter(path, config) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, parameter)
        for name, content in ChatTokenizer.load(data / "tokenizer").files().items():
            writer.add_file(name, content)
    return path


@pytest.fixture(scope="session")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The base that the adapters of these tests are trained on."""
    return open_checkpoint(write_base(tmp_path_factory.mktemp("base") / "base", tiny_data))


def alone() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"), "none")


def engine_on(base: Checkpoint, recipe: Recipe, world: World | None = None, source: TensorSource | None = None) -> Engine:
    """An engine as a run makes it: prepared, wrapped, and loaded with a new adapter (or from `source`)."""
    model = Decoder(base.config, recipe.kernels)
    model.set_recompute(recipe.train.activation_checkpointing)
    prepare(model, recipe)
    engine = build_engine(recipe, model, world or alone())
    if source is None:
        source = base
        if recipe.adapter is not None:
            source = AdaptedSource(base, NewAdapter(base, model, recipe.adapter, 0), recipe.adapter.scale)
    engine.load_model(source)
    engine.describe()
    return engine


@pytest.fixture
def recipe_on(base: Checkpoint, tiny_data: Path) -> Callable[..., Recipe]:
    """recipe_on(strategy, **sections): a recipe with the base's checkpoint."""

    def make(strategy: str = "single", **sections: dict[str, Any]) -> Recipe:
        model = base.config.model_dump(mode="json") | {"checkpoint": str(base.path)} | sections.pop("model", {})
        return recipe_for(str(tiny_data), strategy, model=model, **sections)

    return make


ADAPTER = {"rank": 4, "alpha": 8, "dropout": 0.1, "init": "pissa"}


@pytest.fixture
def write_adapter_recipe(write_recipe: Any, base: Checkpoint) -> Any:
    """write(name, **sections): a recipe of six steps with an adapter on `base`."""

    def write(name: str, **sections: Any) -> Path:
        path: Path = write_recipe(
            name,
            **({"adapter": ADAPTER, "train": {"steps": 6, "accumulation": 1}, "checkpoint": {"every_steps": 3}} | sections),
        )
        text = path.read_text()
        start = text.index("model:\n")
        end = text.index("\n", text.index("vocab_size", start)) + 1  # the shape is the base's own
        precision = sections.get("model", {}).get("base_precision", "fp32")
        path.write_text(f"{text[:start]}model:\n  checkpoint: {base.path}\n  base_precision: {precision}\n{text[end:]}")
        return path

    return write
