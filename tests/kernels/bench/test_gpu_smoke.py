"""The smoke test of `make gpu` at tiny sizes, interpreted: its code runs, and it sees a wrong kernel."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU make gpu runs it at real size")


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "gpu" / "gpu_smoke.py"
    spec = importlib.util.spec_from_file_location("gpu_smoke_small", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module


@pytest.mark.parametrize("op", ["loss products torch bf16", "cross_entropy", "rms_norm", "rope", "swiglu", "decode"])
def test_right_kernels_pass(op: str, smoke: ModuleType) -> None:
    errors = smoke.OPS[op](True)
    assert errors and all(value <= smoke.LIMIT for value in errors.values()), errors


def test_a_wrong_kernel_is_seen(smoke: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = smoke.swiglu

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        out: torch.Tensor = right(*args, **options)
        return torch.cat((out[:1], 1.2 * out[1:]))  # one tile of several

    monkeypatch.setattr(smoke, "swiglu", wrong)
    errors = smoke.OPS["swiglu"](True)
    assert all(value > smoke.LIMIT for value in errors.values()), errors
    assert smoke.error(torch.full((2,), float("nan")), torch.ones(2, dtype=torch.float64)) == float("inf")
