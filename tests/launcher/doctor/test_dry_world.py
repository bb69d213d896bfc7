"""The dry world: bytes and collectives as arithmetic has them, agreement of ranks, and planted faults."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from chatmill.config import ConfigError
from chatmill.launcher.__main__ import main
from chatmill.launcher.doctor.dry_world import Collective, RankStep, check, chosen_ranks, dry_world, first_difference, totals
from chatmill.trainer.config import ModelConfig, Recipe
from chatmill.trainer.parallel_config import Grid

SHAPE = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, context=256, tied_embeddings=False
)


def recipe(accumulation: int = 1, **parallel: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": SHAPE.model_dump(),
            "data": {"sequence_length": 128},
            "train": {"precision": "bf16", "accumulation": accumulation},
            "parallel": {"strategy": "fsdp2", **parallel},
        }
    )


def test_a_step_of_512_ranks_has_the_bytes_that_the_parameters_say() -> None:
    (step, last) = dry_world(recipe(), SHAPE, 512, ranks=[0, 511])
    counts = SHAPE.parameter_counts()
    layer = (counts["attention"] + counts["mlp"] + 4 * 64) // 2
    top = 2 * 512 * 64 + 64
    assert first_difference([step, last]) is None
    moved = {operation: (calls, size) for operation, members, calls, size in totals(step) if members == 512}
    # every tensor is cut along its first dimension: 512 ranks get a row each, or nothing but padding
    widths = {"q": 64, "k": 64, "v": 64, "o": 64, "gate": 64, "up": 64, "down": 128, "norms": 2}
    padded_layer = 512 * sum(widths.values())
    assert padded_layer > layer
    padded_top = 2 * 512 * 64 + 512
    assert padded_top > top
    gathers, gathered = moved["all_gather"]
    assert gathers == 1 + 2 * 2 and gathered == 2 * (padded_top + 4 * padded_layer)  # bf16, forward and backward
    scatters, scattered = moved["reduce_scatter"]
    assert scatters == 3 and scattered == 4 * (padded_top + 2 * padded_layer)  # fp32
    assert moved["all_reduce"][0] == 1  # the norm
    assert step.weights == 4 * (7 * 64 + 64 + 2 + 2 * 64 + 1) + 4 * (7 * 64 + 64 + 2)
    assert last.weights == 4 * 2 * 64  # a row of both tables
    assert step.gradients == step.weights and step.optimizer >= 2 * step.weights


def test_a_grid_talks_within_its_groups_and_all_members_agree() -> None:
    steps = list(dry_world(recipe(replicas=2, context=2), SHAPE, 8))
    assert {0, 1, 2, 3, 4, 7} <= {step.rank for step in steps} and first_difference(steps) is None
    groups = {(call.operation, call.ranks) for call in steps[0].calls}
    assert ("all_to_all", (0, 1)) in groups and ("all_gather", (0, 1, 2, 3)) in groups and ("all_reduce", (0, 4)) in groups


def test_a_rank_that_does_something_else_is_named() -> None:
    one, two = (
        Collective("all_gather", ((8,),), "bfloat16", 16, (0, 1)),
        Collective("reduce_scatter", ((8,),), "float32", 32, (0, 1)),
    )
    good = RankStep(0, 0, 0, 0, (one, two))
    assert first_difference([good, replace(good, rank=1)]) is None

    def beside(*calls: Collective) -> str:
        return str(first_difference([good, RankStep(1, 0, 0, 0, calls)]))

    short = "collective 2 of the 2 ranks from 0 to 1: rank 0 does reduce_scatter 8 float32, rank 1 nothing"
    assert beside(one) == short
    assert "collective 1" in beside(two, one)
    other = replace(one, shapes=((9,),))
    assert "rank 0 does all_gather 8 bfloat16, rank 1 all_gather 9 bfloat16" in beside(other, two)
    assert "rank 1 nothing" in beside()


def test_the_ranks_that_are_simulated_by_default() -> None:
    small = Collective("all_to_all", ((8,),), "bfloat16", 16, (0, 1))
    assert {1, 62, 63, 64, 127} <= set(chosen_ranks(Grid(2, 32, 2), 128, [small], seed=0))
    assert len(chosen_ranks(Grid(1, 4096, 1), 4096, [], seed=0)) <= 5


def test_what_cannot_be_simulated_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="expected 2 to 4096"):
        check(recipe(), 5000, None)
    with pytest.raises(ConfigError, match="not ddp"):
        check(Recipe.model_validate({"parallel": {"strategy": "ddp"}}), 4, None)
    with pytest.raises(ConfigError, match="--ranks 9"):
        check(recipe(), 4, [9])
    assert main(["doctor", "--dry-world", "4"]) == 2 and "expected a recipe" in capsys.readouterr().err
    assert main(["doctor", "8b"]) == 2 and "belong to doctor --dry-world" in capsys.readouterr().err


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "doctor",
        "--dry-world",
        "2",
        "tiny",
        "parallel.strategy=fsdp2",
        "model.layers=1",
        "data.sequence_length=128",
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["difference"] is None and [rank["rank"] for rank in found["ranks"]] == [0, 1]
