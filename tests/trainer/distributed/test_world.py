"""Launches that disagree with the recipe are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatmill.config import ConfigError
from chatmill.trainer.config import Recipe
from chatmill.trainer.distributed.accelerate import given_settings
from chatmill.trainer.distributed.world import asked_threads, check_launch, gloo_interface, requested_processes, start_world


def recipe(strategy: str = "single", precision: str = "fp32") -> Recipe:
    return Recipe.model_validate({"parallel": {"strategy": strategy}, "train": {"precision": precision}})


def test_a_plain_start_and_matching_launches_are_accepted() -> None:
    check_launch(recipe(), {})
    check_launch(recipe("ddp"), {"RANK": "1", "WORLD_SIZE": "2"})
    check_launch(recipe("fsdp2"), {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"})
    check_launch(recipe(precision="bf16"), {"ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize(
    ("strategy", "environment", "message"),
    [
        ("single", {"RANK": "0", "WORLD_SIZE": "2"}, "would train alone"),
        ("ddp", {}, "started alone"),
        ("ddp", {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "told to use FSDP"),
        ("fsdp2", {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "told to use DEEPSPEED"),
        ("single", {"SLURM_STEP_NUM_TASKS": "4"}, "know nothing of each other"),
        ("single", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision=fp16; recipe: train.precision=fp32"),
        ("single", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_a_silent_downgrade_is_refused_with_the_way_out(strategy: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_launch(recipe(strategy), environment)


def test_accelerates_one_process_launcher_is_recognised(tmp_path: Path) -> None:
    asked = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    none = tmp_path / "none.yaml"
    assert requested_processes(asked, ["accelerate", "launch", "--num_processes", "3", "x.py"], none) == 3
    assert requested_processes(asked, ["accelerate", "launch", "--num_processes=4", "x.py"], none) == 4
    config = tmp_path / "config.yaml"
    config.write_text("num_processes: 2\n")
    assert requested_processes(asked, ["accelerate", "launch", "--config_file", str(config), "x.py"], none) == 2
    assert requested_processes({"ACCELERATE_MIXED_PRECISION": "no"}, [], none) is None
    assert requested_processes(asked | {"RANK": "0"}, [], none) is None
    with pytest.raises(ConfigError, match="cannot be told"):
        requested_processes(asked, ["accelerate"], none)


def sharded(**fields: object) -> Recipe:
    return Recipe.model_validate({"parallel": {"strategy": "fsdp2", **fields}, "train": {"precision": "fp32"}})


FSDP = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
ZERO = {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def test_what_accelerate_says_unasked_does_not_count() -> None:
    check_launch(sharded(), FSDP)
    check_launch(sharded(offload="cpu", reshard_after_forward=False), FSDP)
    check_launch(recipe("zero2"), ZERO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version=1; recipe: parallel.strategy=fsdp2"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "recipe: parallel.reshard_after_forward=True"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true; recipe: parallel.offload=none"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "recipe: train.activation_checkpointing=False"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend=inductor; recipe: train.compile=False"),
    ],
)
def test_an_fsdp_setting_that_the_recipe_does_not_share_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_launch(sharded(), FSDP | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage=3; recipe: parallel.strategy=zero2"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device=cpu"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "gradient_accumulation_steps=8; recipe: train.accumulation=1"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, r"gradient_clipping=0.5; recipe: optimizer.clip_norm=1\.0"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "DeepSpeed config file"),
    ],
)
def test_a_deepspeed_setting_that_the_recipe_does_not_share_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_launch(recipe("zero2"), ZERO | change)
    check_launch(recipe("zero2"), ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})


def test_accelerates_config_file_counts_word_for_word(tmp_path: Path) -> None:
    """Its `mixed_precision: no` is a choice; the same word is a default where no file and no flag has it."""
    file = tmp_path / "fsdp.yaml"
    file.write_text("mixed_precision: 'no'\nfsdp_config:\n  fsdp_offload_params: false\n")
    command = ["python", "/usr/bin/accelerate", "launch", "--config_file", str(file), "trainer/train.py", "tiny"]
    given = given_settings(command, tmp_path / "none.yaml")
    assert {"mixed_precision", "fsdp_offload_params"} <= given
    assert given_settings(["accelerate", "launch", "--zero-stage=2", "x.py"], tmp_path / "none.yaml") == {"zero_stage"}
    bf16 = Recipe.model_validate({"parallel": {"strategy": "fsdp2", "offload": "cpu"}})
    check_launch(bf16, FSDP)
    with pytest.raises(ConfigError) as error:
        check_launch(bf16, FSDP, given)
    assert "mixed_precision=no; recipe: train.precision=bf16" in str(error.value)
    assert "fsdp_offload_params=false; recipe: parallel.offload=cpu" in str(error.value)


@pytest.mark.parametrize(
    ("environment", "interface"),
    [
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        ({"NCCL_SOCKET_IFNAME": "eth1"}, "eth1"),
        ({"NCCL_SOCKET_IFNAME": "bond,eth"}, "eth1"),
        ({"NCCL_SOCKET_IFNAME": "=eth10"}, "eth10"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, None),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, None),
        ({"NCCL_SOCKET_IFNAME": "ens"}, None),
        ({"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth1"}, None),
        ({}, None),
    ],
)
def test_gloo_takes_the_interface_that_nccl_was_told(environment: dict[str, str], interface: str | None) -> None:
    assert gloo_interface(environment, ["lo", "eth10", "eth1", "ib1", "ib0", "docker0"]) == interface


def test_threads_are_those_that_the_user_asked_for() -> None:
    assert asked_threads({"OMP_NUM_THREADS": "3"}, None) == 3
    assert asked_threads({"OMP_NUM_THREADS": "3,2"}, None) == 3  # one number per level of nesting
    assert asked_threads({"OMP_NUM_THREADS": "1"}, {}) is None  # torchrun and accelerate set it themselves
    assert asked_threads({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}) == 2
    assert asked_threads({"OMP_NUM_THREADS": "many"}, None) is asked_threads({}, None) is None


def test_a_training_on_a_cpu_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    try:
        for asked, word in ((3, "3"), (2, "2")):
            monkeypatch.setenv("OMP_NUM_THREADS", word)
            start_world(recipe())
            assert torch.get_num_threads() == asked
        start_world(Recipe.model_validate({"train": {"precision": "fp32", "cpu_threads": 1}}))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
