"""Models of transformers, from their folder and back: logits, packing, gradients and exports against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.backends.architectures import ARCHITECTURES, ROWS, config_of, make_folder
from torch.nn import functional as F

from chatmill.trainer.backends.choose import build_model
from chatmill.trainer.convert.hf import export_hf, import_hf
from chatmill.trainer.model.language_model import LanguageModel

COVERING = ("qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma2", "granite", "qwen3_next")
LENGTHS = (11, 1, 20, 7)
TOKENS = torch.randint(3, 64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
EDGES = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)


def next_tokens() -> torch.Tensor:
    """The token after each one, and no target at a document's end or in a few other places."""
    targets = TOKENS.roll(-1).clone()
    targets[EDGES[1:].long() - 1] = -100
    targets[3:6] = -100
    return targets


def their_loss(model: Any) -> torch.Tensor:
    """Sum over the targets, with each document alone in transformers' own forward pass."""
    losses = []
    for part, wanted in zip(TOKENS.split(LENGTHS), next_tokens().split(LENGTHS), strict=True):
        logits = model(input_ids=part[None], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits.float(), wanted, reduction="sum", ignore_index=-100))
    return torch.stack(losses).sum()


def our_loss(model: LanguageModel) -> torch.Tensor:
    targets = next_tokens()
    rows = (targets != -100).nonzero()[:, 0].to(torch.int32)
    found: torch.Tensor = model(TOKENS, POSITIONS, EDGES, targets=targets, rows=rows, max_seqlen=max(LENGTHS)).loss_sum
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in COVERING else pytest.mark.exhaustive) for n in ARCHITECTURES]
)
def test_a_model_of_transformers_trains_as_it_does_there_and_goes_back_as_it_came(name: str, tmp_path: Path) -> None:
    theirs = make_folder(name, tmp_path / "hf")
    checkpoint = import_hf(tmp_path / "hf", tmp_path / "ours", impl="transformers")
    assert checkpoint.config.documents == ("rows" if name in ROWS else "packed")
    assert checkpoint.config.parameter_counts()["total"] == sum(p.numel() for p in theirs.parameters())
    model = build_model(checkpoint.config)
    checkpoint.check_model()
    checkpoint.load_into(model)

    # logits of the pack are those of each document alone in transformers
    with torch.no_grad():
        alone = torch.cat([theirs(input_ids=part[None], use_cache=False).logits[0] for part in TOKENS.split(LENGTHS)])
        torch.testing.assert_close(model(TOKENS, POSITIONS, EDGES, max_seqlen=max(LENGTHS)), alone, rtol=0, atol=1e-4)

    # three steps: the same losses and gradients
    theirs.train(), model.train()
    ours, named = dict(model.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == named.keys()
    for _ in range(3):
        losses = []
        for one, loss in ((theirs, their_loss), (model, our_loss)):
            one.zero_grad()
            value = loss(one)
            value.backward()
            losses.append(float(value.detach()))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        for key, parameter in named.items():
            there = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            here = torch.zeros_like(parameter) if ours[key].grad is None else ours[key].grad
            near = (1e-4 if name not in ROWS else 5e-3) * max(
                1.0, float(there.abs().max())
            )  # recurrences round otherwise when padded
            torch.testing.assert_close(here, there, rtol=1e-4, atol=near, msg=lambda text, key=key: f"{key}: {text}")
        with torch.no_grad():
            for parameters in (named, ours):
                for parameter in parameters.values():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
    assert losses[0] < 0.99 * float(their_loss(type(theirs).from_pretrained(tmp_path / "hf")))

    # the export is the folder that came
    export_hf(checkpoint, tmp_path / "back")
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    came, went = config_of(tmp_path / "hf"), config_of(tmp_path / "back")
    assert {key: value for key, value in went.items() if key != "torch_dtype"} == {
        key: value for key, value in came.items() if key != "transformers_version"
    } | {key: went[key] for key in ("transformers_version",) if key in went}
