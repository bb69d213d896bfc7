"""One decision point: the table chooses, a user can force, a refusal says why."""

import logging

import pytest
import torch

from chatmill.kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
EVERYTHING = {"hopper": None, "triton": None, "flash": None, "sdpa": None, "torch": None}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: 90 if device.type == "cuda" else 0)


def test_a_cpu_gets_the_torch_path() -> None:
    assert dispatch.choose("attention", "auto", CPU, EVERYTHING) == "torch"
    assert dispatch.choose("attention", "auto", torch.device("mps"), EVERYTHING, packed=True) == "torch"


def test_packed_and_single_documents_follow_their_own_rule(hopper: None) -> None:
    assert dispatch.choose("attention", "auto", CUDA, EVERYTHING, packed=True) == "flash"
    assert dispatch.choose("attention", "auto", CUDA, EVERYTHING | {"flash": "not installed"}, packed=True) == "triton"
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
            dispatch.choose("attention", "auto", CUDA, EVERYTHING | {"flash": "not installed"}, packed=True)
    assert [r.message for r in caplog.records] == ["attention packed on cuda sm_90: triton (not flash: not installed)"]


def test_every_kernel_has_a_rule_for_every_machine() -> None:
    for rules in dispatch.shipped_table().values():
        assert rules[-1] == {"device": "any", "choose": ["torch"], "timed": True}
