"""The AdamW step over many tensors against torch.optim.AdamW with torch's clipping: values, skipping, edges, memory traffic."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from chatmill.kernels import adamw_triton
from chatmill.kernels.adamw import BYTES, adamw_, squared_norm_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(3,), (1023,), (1024,), (1025,), (65, 37), (1,), (2048 + 5,)]
DECAYS = [0.0, 0.1, 0.1, 0.0, 0.3, 0.0, 0.1]


def tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator) * scale).to(DEVICE) for size in SIZES]


def state() -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """(weights, means, squares, step)."""
    weights = tensors(0)
    return (
        weights,
        [torch.zeros_like(w) for w in weights],
        [torch.zeros_like(w) for w in weights],
        torch.zeros((), device=DEVICE),
    )


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_steps_equal_torchs_with_its_clipping(impl: str, max_norm: float | None) -> None:
    weights, means, squares, step = state()
    theirs = [w.clone().requires_grad_() for w in weights]
    groups = [{"params": [w], "weight_decay": d} for w, d in zip(theirs, DECAYS, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    copies = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    for i in range(4):
        gradients = tensors(10 + i, scale=10.0**-i)
        for w, g in zip(theirs, gradients, strict=True):
            w.grad = g.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm or float("inf"))
        optimizer.step()
        kept = [g.clone() for g in gradients]
        norm = adamw_(
            weights, gradients, means, squares, step, lr=1e-2, weight_decays=DECAYS, max_norm=max_norm, copies=copies, impl=impl
        )
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        assert all(torch.equal(g, k) for g, k in zip(gradients, kept, strict=True)), "gradients are only read"
    assert step == 4
    for w, their, m, v, copy in zip(weights, theirs, means, squares, copies, strict=True):
        torch.testing.assert_close(w, their.detach(), rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(m, optimizer.state[their]["exp_avg"], rtol=2e-6, atol=1e-8)
        torch.testing.assert_close(v, optimizer.state[their]["exp_avg_sq"], rtol=2e-6, atol=1e-10)
        assert torch.equal(copy, w.bfloat16())


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(impl: str, bad: float) -> None:
    weights, means, squares, step = state()
    gradients = tensors(1)
    gradients[4][64, 36] = bad
    before = [t.clone() for t in (*weights, *means, *squares, step)]
    copies = [torch.zeros_like(w, dtype=torch.bfloat16) for w in weights]
    norm = adamw_(
        weights, gradients, means, squares, step, lr=1.0, weight_decays=DECAYS, max_norm=1.0, copies=copies, impl=impl
    )
    assert not norm.isfinite()
    for old, new in zip(before, (*weights, *means, *squares, step), strict=True):
        assert torch.equal(old, new)
    assert all(torch.equal(c, w.bfloat16()) for c, w in zip(copies, weights, strict=True)), "the copy is of the old weights"


def test_parts_with_a_norm_of_the_whole_equal_one_step_over_all() -> None:
    """What ranks that hold shards do: each sums its squares, the sums are added, each updates its part."""
    whole, parts, gradients = state(), state(), tensors(3)
    adamw_(whole[0], gradients, whole[1], whole[2], whole[3], lr=1e-2, weight_decays=DECAYS, max_norm=0.1)
    total = squared_norm_of(gradients[:3]) + squared_norm_of(gradients[3:])
    for part in (slice(0, 3), slice(3, None)):
        lists = [each[part] for each in parts[:3]]
        step = torch.zeros((), device=DEVICE)
        adamw_(
            lists[0],
            gradients[part],
            lists[1],
            lists[2],
            step,
            lr=1e-2,
            weight_decays=DECAYS[part],
            max_norm=0.1,
            squared_norm=total,
        )
    for one, other in zip(whole[0], parts[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_only_the_tensors_own_memory_is_touched_wherever_it_begins() -> None:
    """Neighbours in one buffer, at addresses that are no multiple of 16 bytes."""
    fences, views = [], []
    for kind in range(4):
        buffer = torch.full((1200,), 7.0, device=DEVICE)
        view = buffer[3:1130]
        view.copy_(torch.linspace(0.1, 1, 1127) * (kind + 1))
        fences.append(buffer)
        views.append([view])
    assert not adamw_triton._is_aligned(views)
    expected = [v[0].clone() for v in views]
    step = torch.zeros((), device=DEVICE)
    adamw_(*views, step, lr=1e-2, weight_decays=[0.1])
    adamw_(*([e] for e in expected), torch.zeros((), device=DEVICE), lr=1e-2, weight_decays=[0.1], impl="reference")
    for buffer, view, exact in zip(fences, views, expected, strict=True):
        torch.testing.assert_close(view[0], exact, rtol=2e-6, atol=1e-7)
        assert (buffer[:3] == 7).all() and (buffer[1130:] == 7).all()


def test_blocks_beyond_32_bit_offsets_are_64_bit() -> None:
    which, start, sizes = adamw_triton._blocks((5, 3_000_000_001), torch.device("cpu"))
    assert start.dtype is torch.int64 and sizes.tolist() == [5, 3_000_000_001]
    last = int(start[-1]) * adamw_triton.BLOCK
    assert which[-1] == 1 and last > 2**31 and last < 3_000_000_001 <= last + adamw_triton.BLOCK


def test_misuse_is_refused_in_words() -> None:
    weights, means, squares, step = state()
    with pytest.raises(ValueError, match="lists of one length"):
        adamw_(weights, weights, means, squares, step, lr=1.0, weight_decays=[0.0])
    with pytest.raises(ValueError, match=r"tensor 4: expected contiguous torch\.float32"):
        adamw_(weights, [w.T if w.dim() > 1 else w for w in weights], means, squares, step, lr=1.0, weight_decays=DECAYS)


def test_builds_move_the_bytes_that_are_counted_in_whole_vectors() -> None:
    """32 bytes per parameter: 4 in the norm, 16 read and 12 written in the update, all in accesses of 16 bytes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "chatmill.kernels.cross_compile",
        "chatmill.kernels.adamw_triton",
        "--arch",
        "90",
        "--json",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}

    def moved(name: str) -> tuple[float, float]:
        per_thread = (rows[name]["sass"].get(op, 0) * 16 for op in ("LDG.E.128", "STG.E.128"))
        read, written = (count * 32 * rows[name]["warps"] / adamw_triton.BLOCK for count in per_thread)
        return read, written

    assert (moved("squares"), moved("adamw"), moved("adamw with bf16 copy")) == ((4, 0), (16, 12), (16, 14))
    assert sum(moved("squares")) + sum(moved("adamw")) == BYTES["triton"]
    assert moved("adamw unaligned") == (0, 0), "rows that begin anywhere are read element by element"
