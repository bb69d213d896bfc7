"""One of two processes that train a model of transformers with every engine and compare it with the single process."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from tests.trainer.engine.engine_worker import alone, close, state, train

from chatmill.trainer.backends.choose import build_model
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import Recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.choose import build_engine
from chatmill.trainer.engine.engine import Engine


def engine_of(world: World, data: str, folder: str, strategy: str, **train_section: Any) -> Engine:
    recipe = Recipe.model_validate(
        {
            "data": {"path": data, "sequence_length": 128},
            "model": {"checkpoint": folder},
            "optimizer": {"lr": 1e-2, "eps": 1e-4},
            "train": {"precision": "fp32", "accumulation": 4 if strategy == "single" else 2, **train_section},
            "parallel": {"strategy": strategy},
        }
    )
    checkpoint = open_checkpoint(folder, verify=False)
    model = build_model(checkpoint.config, recipe.kernels)
    model.set_recompute(recipe.train.activation_checkpointing, recipe.train.activation_checkpointing_layers)
    engine = build_engine(recipe, model, world)
    engine.load_model(checkpoint)
    engine.describe()
    return engine


def run(data: str, folders: tuple[str, ...], engines: tuple[tuple[str, dict[str, Any]], ...]) -> None:
    """Each engine with each checkpoint: losses of three steps and all weights are those of one process."""
    dist.init_process_group("gloo")
    world = World(int(os.environ["RANK"]), 2, int(os.environ["RANK"]), 2, torch.device("cpu"), "gloo")
    for folder in folders:
        single = engine_of(alone(), data, folder, "single")
        losses = train(single)
        weights = state(single)
        for strategy, options in engines:
            engine = engine_of(world, data, folder, strategy, **options)
            close(train(engine), losses)
            found = state(engine)
            assert found.keys() == weights.keys(), (strategy, sorted(found.keys() ^ weights.keys())[:4])
            for name, tensor in weights.items():
                difference = float((found[name] - tensor).abs().max())
                assert difference < 2e-5 + 1e-3 * float(tensor.abs().max()), (strategy, name, difference)
            print(f"passed {strategy} {options} {folder}", flush=True)
    dist.destroy_process_group()
