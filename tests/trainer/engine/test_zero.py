"""DeepSpeed ZeRO on gloo: the losses of the single process, and checkpoints that every engine reads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from chatmill.config import ConfigError
from chatmill.run_files import read_jsonl
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import Recipe, load_recipe
from chatmill.trainer.loop.loop import train

from ..conftest import cut_back
from ..ranks import train_in_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (make .venv/.deepspeed)"
    ),
]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def test_offload_to_nvme_is_configured_for_deepspeed_and_refused_without_its_folder(tmp_path: Path) -> None:
    from chatmill.trainer.engine.deepspeed_setup import check_nvme, zero_config

    parallel = {"strategy": "zero3", "offload": "nvme", "nvme_path": str(tmp_path)}
    recipe = Recipe.model_validate({"parallel": parallel, "train": {"accumulation": 8}})
    place = {"device": "nvme", "pin_memory": torch.cuda.is_available(), "nvme_path": str(tmp_path)}
    assert zero_config(recipe, 3, 10**6) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 8,
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": False,
            "reduce_bucket_size": 10**6,
            "offload_optimizer": place,
            "offload_param": place,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 30,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 1.0,
    }
    with pytest.raises(ConfigError, match=r"nvme_path=.* is not a folder|needs libaio"):
        check_nvme(tmp_path / "missing")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_bucket_of_gradients_is_no_larger_than_the_model_or_deepspeed_s_own(stage: int) -> None:
    from chatmill.trainer.engine.deepspeed_setup import zero_config

    recipe = Recipe.model_validate({"parallel": {"strategy": f"zero{stage}"}})
    sizes = {
        n: zero_config(recipe, stage, n)["zero_optimization"]["reduce_bucket_size"] for n in (1, 12_345, 5 * 10**8, 10**10)
    }
    assert sizes == {1: 1, 12_345: 12_345, 5 * 10**8: 5 * 10**8, 10**10: 5 * 10**8}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_the_single_process_does(stage: int, write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("reference"))))
    prompts = {"prompts": ["Where?"], "max_new_tokens": 2}  # stage 3 gathers weights for the reply: every rank must take part
    recipe = write_recipe("zero", parallel={"strategy": f"zero{stage}"}, train={"accumulation": 2}, evaluation=prompts)
    out = train_in_ranks(recipe, 2)
    run = tmp_path / "runs" / "zero"
    assert f"strategy zero{stage} (DeepSpeedEngine/" in out
    assert f"sharded {20 if stage == 3 else 0} of 20" in out
    assert [line["step"] for line in read_jsonl(run / "samples.jsonl")] == [8]
    assert losses(run) == pytest.approx(losses(tmp_path / "runs" / "reference"), rel=2e-5)
    expected = open_checkpoint(tmp_path / "runs" / "reference")
    found = open_checkpoint(run)
    for group in ("model", "optimizer"):
        tensors = dict(expected.tensors(group))
        assert set(found.names(group)) == set(tensors)
        for name, tensor in found.tensors(group):
            torch.testing.assert_close(tensor, tensors[name], rtol=2e-3, atol=5e-5, msg=name)


def test_a_checkpoint_moves_between_zero_and_the_other_engines(write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("reference"))))
    expected = losses(tmp_path / "runs" / "reference")
    recipe = write_recipe("moved")
    run = tmp_path / "runs" / "moved"
    train_in_ranks(recipe, 2, "parallel.strategy=zero3", "train.accumulation=2")
    cut_back(run, 4)
    train(load_recipe(str(recipe)))
    assert losses(run) == pytest.approx(expected, rel=2e-5)
    cut_back(run, 4)
    train_in_ranks(recipe, 2, "parallel.strategy=zero1", "train.accumulation=2")
    assert losses(run) == pytest.approx(expected, rel=2e-5)
    cut_back(run, 4)
    train_in_ranks(recipe, 4, "parallel.strategy=zero3", "train.accumulation=1")
    assert losses(run) == pytest.approx(expected, rel=2e-5)
    cut_back(run, 4)
    train_in_ranks(recipe, 2, "parallel.strategy=fsdp2", "train.accumulation=2")
    assert losses(run) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_bf16_keeps_fp32_masters_and_follows_ddp(strategy: str, write_recipe, tmp_path: Path) -> None:
    settings = {"accumulation": 2, "precision": "bf16"}
    train_in_ranks(write_recipe("ddp", parallel={"strategy": "ddp"}, train=settings), 2)
    train_in_ranks(write_recipe("zero", parallel={"strategy": strategy}, train=settings), 2)
    ddp, zero = losses(tmp_path / "runs" / "ddp"), losses(tmp_path / "runs" / "zero")
    assert zero == pytest.approx(ddp, rel=5e-3)
    tensor = open_checkpoint(tmp_path / "runs" / "zero").tensor("layers.0.mlp.up.weight")
    assert tensor.dtype == torch.float32
    assert not torch.equal(tensor, tensor.bfloat16().float()), "the masters were rounded to bf16"
    environment = json.loads((tmp_path / "runs" / "zero" / "environment.json").read_text())
    assert environment["compute_dtype"] == "bfloat16"
