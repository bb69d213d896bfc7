"""One step, divided and computed in every way the trainer has: the same losses and gradients (`chatmill doctor --parity`)."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatmill.launcher.doctor import parity_rank
from chatmill.launcher.doctor.parity import (
    ENGINES,
    WORLD_SIZES,
    CaseResult,
    all_cases,
    covering_set,
    is_failure,
    judge,
    line,
    missing,
)
from chatmill.launcher.doctor.parity_case import Case
from chatmill.trainer.config import Recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.torch_engine import TorchEngine

ROOT = Path(__file__).resolve().parents[3]
GROUPS = {(engine, size) for engine in ENGINES for size in (WORLD_SIZES if engine != "single" else (1,))}
ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")


def test_the_covering_set_holds_every_pair_of_values_and_every_engine_at_every_world_size() -> None:
    cases = all_cases(ENGINES, WORLD_SIZES, ("reference", "torch", "triton"))
    chosen = covering_set(cases)
    assert len(cases) == 16 * 3 * 2 * 2 * 3
    assert len(chosen) < 25
    assert sum(case.kernels == "triton" for case in chosen) < 10  # an interpreted case takes ten times as long as another
    names = [field.name for field in dataclasses.fields(Case)]
    for one, two in itertools.combinations(names, 2):
        pairs = {(getattr(case, one), getattr(case, two)) for case in cases}
        assert {(getattr(case, one), getattr(case, two)) for case in chosen} == pairs, (one, two)
    assert {(c.engine, c.world_size) for c in chosen} == {
        (e, w) for e in ENGINES for w in (WORLD_SIZES if e != "single" else (1,))
    }


@pytest.mark.slow
def test_every_engine_gives_the_reference_s_losses_and_gradients(tmp_path: Path) -> None:
    out = tmp_path / "parity.json"
    command = [
        sys.executable,
        "-m",
        "chatmill.launcher",
        "doctor",
        "--parity",
        "--kernels",
        "reference,torch",
        "--out",
        str(out),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found = json.loads(out.read_text())
    rows = [CaseResult(Case(**row.pop("case")), **row) for row in found["rows"]]
    ran = {(row.case.engine, row.case.world_size) for row in rows if row.loss is not None}
    assert ran == {(engine, size) for engine, size in GROUPS if not missing(engine)}
    assert not [line(row) for row in rows if is_failure(row)]
    assert f"tolerance: losses {found['loss_tolerance']:g}" in done.stdout
    assert all(line(row) in done.stdout for row in rows)


@pytest.mark.exhaustive  # test_engines.py has the interpreted kernels on gathered weights
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_interpreted_triton_kernels_give_the_reference_s_losses_and_gradients() -> None:
    """One case of `doctor --parity`, which runs every engine so; in a new process: Triton reads the variable at import."""
    case = "Case('ddp', 2, 2, 'packed', True, 'triton')"
    code = f"from chatmill.launcher.doctor.parity import Case, line, run_parity; [print(line(x)) for x in run_parity([{case}])]"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1].split()  # DeepSpeed may print a warning first
    assert row[:6] == ["ddp", "2", "2", "packed", "on", "triton"], done.stdout
    assert row[-1] == "ok", done.stdout


@pytest.fixture(scope="module")
def reference() -> dict[str, object]:
    losses, gradients = parity_rank.train_case(Case("single", 1), ALONE)
    return {"losses": losses, "gradients": gradients}


def compare(case: Case, reference: dict) -> CaseResult:
    losses, gradients = parity_rank.train_case(case, ALONE)
    worst = max(float((gradients[n] - g).norm() / g.norm()) for n, g in reference["gradients"].items())
    return judge(case, {"losses": losses, "gradient": worst}, reference)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_padding_and_recomputation_change_nothing(accumulation: int, reference: dict) -> None:
    assert len(set(reference["losses"])) == parity_rank.STEPS  # it does train
    row = compare(Case("single", 1, accumulation, "padded", True, "torch"), reference)
    assert row.problem == ""
    assert row.loss is not None and row.loss < 1e-6


def test_a_mean_over_micro_batches_instead_of_over_tokens_is_caught(reference: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic error of gradient accumulation: each micro-batch divides by its own count."""

    def wrong(self: TorchEngine, batches):
        micro = [dataclasses.replace(b, step_loss_tokens=b.loss_tokens * len(batches)) for b in batches]
        sums = [original(self, [batch]) for batch in micro]
        return dataclasses.replace(sums[0], loss_sum=sum(s.loss_sum for s in sums))

    original = TorchEngine.forward_backward
    monkeypatch.setattr(TorchEngine, "forward_backward", wrong)
    row = compare(Case("single", 1, 4), reference)
    assert "gradient differs" in row.problem
    assert is_failure(row)


def test_a_leak_between_packed_dialogues_is_caught(reference: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(recipe: Recipe, world: World):
        for batch in original(recipe, world):
            ends = torch.tensor([0, batch.tokens.numel()], dtype=torch.int32)
            yield dataclasses.replace(batch, cu_seqlens=ends, max_seqlen=batch.tokens.numel())

    original = parity_rank.stream
    monkeypatch.setattr(parity_rank, "stream", leaking)
    assert "loss differs" in compare(Case("single", 1), reference).problem


def test_not_a_number_is_no_parity(reference: dict) -> None:
    found = {"losses": reference["losses"], "gradient": float("nan")}
    assert "gradient" in judge(Case("ddp", 2), found, reference).problem
    for step in range(parity_rank.STEPS):  # wherever it is
        losses = list(reference["losses"])
        losses[step] = float("nan")
        assert "loss" in judge(Case("ddp", 2), {"losses": losses, "gradient": 0.0}, reference).problem
