"""One decision point: the table chooses, a user can force, a refusal says why."""

import ast
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chatmill.kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
EVERYTHING = dict.fromkeys(("hopper", "triton", "flash2", "flash3", "flash4", "sdpa", "torch"))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: 90 if device.type == "cuda" else 0)


def test_a_cpu_gets_the_torch_path() -> None:
    assert dispatch.choose("attention", "auto", CPU, EVERYTHING) == "torch"
    assert dispatch.choose("attention", "auto", torch.device("mps"), EVERYTHING, packed=True) == "torch"


def test_packed_and_single_documents_follow_their_own_rule(hopper: None) -> None:
    assert dispatch.choose("attention", "auto", CUDA, EVERYTHING, packed=True) == "flash3"
    assert dispatch.choose("attention", "auto", CUDA, EVERYTHING | {"flash3": "not installed"}, packed=True) == "triton"
    assert dispatch.choose("attention", "auto", CUDA, EVERYTHING, packed=False) == "sdpa"


def test_the_untimed_hopper_tier_is_never_chosen_by_itself(hopper: None) -> None:
    for rules in dispatch.shipped_table().values():
        assert all("hopper" not in rule["choose"] for rule in rules if not rule["timed"])
    assert dispatch.choose("attention", "hopper", CUDA, EVERYTHING) == "hopper"


def test_a_forced_choice_that_cannot_work_says_why() -> None:
    with pytest.raises(ValueError, match="impl='flash' cannot do this: flash-attn is not installed"):
        dispatch.choose("attention", "flash", CPU, {"flash": "flash-attn is not installed"})
    with pytest.raises(ValueError, match="unknown; choose auto or one of torch, triton"):
        dispatch.choose("attention", "cuda", CPU, {"torch": None, "triton": None})


def test_the_choice_is_logged_once_with_what_was_passed_over(hopper: None, caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="chatmill.kernels"):
        for _ in range(3):
            dispatch.choose("attention", "auto", CUDA, EVERYTHING | {"flash3": "not installed"}, packed=True)
    assert [r.message for r in caplog.records] == ["attention packed on cuda sm_90: triton (not flash3: not installed)"]


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (80, ["flash2", "triton", "sdpa"]),
        (89, ["flash2", "triton", "sdpa"]),
        (90, ["flash3", "triton", "flash2", "sdpa"]),
        (100, ["flash4", "triton", "sdpa"]),
        (120, ["flash4", "triton", "sdpa"]),
    ],
)
def test_each_generation_of_gpu_has_its_own_order(number: int, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: number)
    obstacles: dict[str, dispatch.Obstacle] = dict(EVERYTHING)
    for name in order:
        assert dispatch.choose("attention", "auto", CUDA, obstacles, packed=True) == name
        obstacles[name] = "not here"
    assert dispatch.choose("attention", "auto", CUDA, obstacles, packed=True) == "torch"


def test_only_what_the_table_gets_to_is_asked(hopper: None) -> None:
    def never() -> str:
        raise AssertionError("asked")

    obstacles = EVERYTHING | {"flash2": never, "flash4": never, "sdpa": never}
    assert dispatch.choose("attention", "auto", CUDA, obstacles, packed=True) == "flash3"


def test_every_kernel_has_a_rule_for_every_machine() -> None:
    for rules in dispatch.shipped_table().values():
        assert rules[-1] == {"device": "any", "choose": ["torch"], "timed": True}


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda:0 is current and the tensors lie on cuda:1: Triton would launch on cuda:0."""
    current = []

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    launch = dispatch.on_its_device(lambda *_, **__: list(current))
    with FakeTensorMode():
        there = torch.empty(2, device="cuda:1")
    assert launch(there, None) == [torch.device("cuda:1")]
    assert launch((), [3, [there]], 1.0) == [torch.device("cuda:1")]
    assert launch(torch.zeros(2), there) == [] and launch(1) == [] and current == []


def test_the_name_of_every_kernel_says_its_operation() -> None:
    """A profile lists kernels of torch, NCCL and other libraries beside ours, by name alone."""
    names = [
        function.name
        for file in Path(dispatch.__file__).parent.rglob("*.py")
        for function in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(function, ast.FunctionDef)
        and any("jit" in ast.unparse(d) for d in function.decorator_list)
        and function.name.endswith("_kernel")
    ]
    operations = ("attention_", "cross_entropy_", "rms_norm_", "rope_", "swiglu_")
    assert len(names) > 15 and all(name.startswith(operations) for name in names), names


def test_every_function_that_launches_a_kernel_is_guarded() -> None:
    bare, launching = [], 0
    for file in sorted(Path(dispatch.__file__).parent.rglob("*.py")):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            launched = [node.args[0] for node in calls if ast.unparse(node.func) == "launch" and node.args]
            launched += [node.func.value for node in calls if isinstance(node.func, ast.Subscript)]
            launches = any(ast.unparse(kernel).endswith("_kernel") for kernel in launched)
            launching += launches
            if launches and "on_its_device" not in map(ast.unparse, function.decorator_list):
                bare.append(f"{file.name}: {function.name}")
    assert bare == [] and launching >= 15


def test_the_decoder_is_imported_without_the_compiler() -> None:
    """torch._dynamo and sympy take as long as torch itself to import; chat, plan and the like never need them."""
    code = "import sys, chatmill.trainer.model.decoder; print(sorted({'torch._dynamo', 'sympy'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kernels_keep_fused_multiply_adds_where_triton_no_longer_has_them_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """triton 3.10 turns fusion off unless a kernel or this variable asks for it."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    dispatch._keep_fusion.cache_clear()
    dispatch.on_its_device(lambda: None)()
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    dispatch._keep_fusion.cache_clear()
    dispatch.on_its_device(lambda: None)()
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "0", "the user's own choice holds"
