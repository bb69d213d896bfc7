"""Launches without a GPU: what ships would start on every generation, and what would not is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import chatmill
from chatmill.kernels.gates import dry_launch, fake_gpu

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def samples() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(chatmill.__file__).parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("dry_samples.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_what_ships_would_start_on_every_generation(samples: dict[str, Any]) -> None:
    assert not {(row["arch"], row["name"]): row["problems"] for row in samples["outcomes"] if row["problems"]}
    assert {row["arch"] for row in samples["outcomes"]} == set(dry_launch.ARCHS)
    assert samples["missed"] == [], "kernels that no case launches"


def test_dispatch_took_the_kernels_that_the_case_is_about(samples: dict[str, Any]) -> None:
    kernels = {(row["arch"], row["name"]): row["kernels"] for row in samples["outcomes"]}
    names = ("attention_forward_kernel", "attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel")
    assert tuple(kernels[80, "attention D128 bf16 long"]) == names
    assert kernels[90, "hopper D128 bf16 long"][0] == "attention_forward_hopper_kernel"
    assert "attention_backward_hopper_kernel" in kernels[90, "hopper D128 bf16 long"]
    assert "attention_backward_hopper_kernel" not in kernels[90, "hopper D64 bf16 deterministic"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing_constant", "missing 1 required positional argument: 'BLOCK'"),
        ("wrong_type", "Compil"),
        ("rows_between_16_bytes", "strides must be 16-byte aligned"),
        ("grid_too_wide", "along y it must be 1 to 65535"),
        ("too_much_shared_memory", "OutOfResources: out of resource: shared memory"),
        ("no_fused_multiply_add", "without fused multiply-adds"),
    ],
)
def test_a_planted_fault_is_seen(samples: dict[str, Any], fault: str, words: str) -> None:
    assert words in samples["faults"][fault]


def test_limits_of_the_driver() -> None:
    good: dict[str, Any] = {"swizzle": 3, "element_bytes": 2, "box": [128, 64], "shape": [300, 128], "strides": [128, 1]}
    fake_gpu.check_tensor_map(4096, **good)
    for change, words in (
        ({"box": [128, 128]}, "more than the swizzle"),
        ({"box": [128, 4], "swizzle": 1}, "no multiple of 16"),
        ({"shape": [0, 128]}, "1 to 2^32"),
        ({"strides": [128, 2]}, "innermost stride"),
    ):
        with pytest.raises(fake_gpu.LaunchError, match=words.replace("^", r"\^")):
            fake_gpu.check_tensor_map(4096, **(good | change))
    with pytest.raises(fake_gpu.LaunchError, match="0x1008"):
        fake_gpu.check_tensor_map(4104, **good)
    with pytest.raises(fake_gpu.LaunchError, match="along z"):
        fake_gpu.check_grid("k", (1, 1, 65_536))
    assert "3000 bytes of stack" in dry_launch.stack_problem("attention_dq_kernel", 3_000)
    assert dry_launch.stack_problem("rope_kernel", 8) and not dry_launch.stack_problem("rope_kernel", 0)
