"""ttsem executes what Triton's compiler makes of our kernels: nothing outside of tensors, no races; planted faults are seen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("ttsem", reason="ttsem is not installed: pip install --no-deps --ignore-requires-python ttsem")

import chatmill

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def samples() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(chatmill.__file__).parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("memory_samples.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_shipped_kernels_stay_inside_their_tensors_and_race_nowhere(samples: dict[str, Any]) -> None:
    assert not {case["name"]: case["text"] for case in samples["cases"] if case["status"] != "ok"}
    assert len(samples["cases"]) >= 6 and sum(case["launches"] for case in samples["cases"]) >= 15


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("read outside", ("oob_read", "swiglu_forward_kernel", "`GATE`")),
        ("write outside", ("oob_write", "swiglu_forward_kernel", "`Y`")),
        ("race", ("race", "rms_norm_backward_kernel", "`PARTIAL`")),
    ],
)
def test_a_planted_fault_is_named_with_its_kernel_and_tensor(
    samples: dict[str, Any], fault: str, words: tuple[str, ...]
) -> None:
    assert all(word in samples["faults"][fault] for word in words), samples["faults"][fault]
