"""A head split over the vocabulary of 2 and 3 gloo ranks equals the whole head on one: loss, metrics, every gradient."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from chatmill.kernels.cross_entropy import cross_entropy, linear_cross_entropy_with_metrics
from chatmill.kernels.cross_entropy.rows import VocabularyShard

OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 1e-2, "reduction": "none"},
    {"label_smoothing": 0.1, "normalizer": 7.0},
    {
        "token_weights": torch.linspace(0, 2, 37, dtype=torch.float64),
        "norm_weight": torch.linspace(1, 2, 16),
        "reduction": "sum",
    },
]
PLAIN: list[dict[str, Any]] = [{"inplace": True, "label_smoothing": 0.1}, {"softcap": 4.0, "reduction": "none"}]
N, H, V = 37, 16, 61


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::3] = -100
    return hidden, weight, targets


def losses_and_gradients(shard: VocabularyShard | None, rows: slice, impl: str, options: dict[str, Any]) -> list[Tensor]:
    hidden, weight, targets = problem(torch.float64)
    x, w = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
    loss, metrics = linear_cross_entropy_with_metrics(x, w, targets, shard=shard, impl=impl, **options)
    loss.backward(torch.linspace(1, 2, N, dtype=torch.float64) if loss.dim() else None)
    assert x.grad is not None and w.grad is not None and metrics.lse is not None and metrics.token_losses is not None
    return [loss.detach(), metrics.lse, metrics.token_losses, metrics.correct, metrics.count, x.grad, w.grad]


def plain_loss_and_gradient(shard: VocabularyShard | None, columns: slice, impl: Any, options: dict[str, Any]) -> list[Tensor]:
    """The same of the plain form on this rank's columns of given logits."""
    hidden, weight, targets = problem(torch.float64)
    logits = (hidden @ weight.T)[:, columns].clone().requires_grad_()
    loss, metrics = cross_entropy(logits * 1, targets, shard=shard, impl=impl, **options)
    loss.backward(torch.linspace(1, 2, N, dtype=torch.float64) if loss.dim() else None)
    assert logits.grad is not None and metrics.lse is not None
    return [loss.detach(), metrics.lse, metrics.correct, logits.grad.T]


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    bounds = [0, 7, V] if world == 2 else [0, 1, 40, V]  # a shard of one column too
    rows = slice(bounds[rank], bounds[rank + 1])
    shard = VocabularyShard(first=rows.start, vocabulary=V)
    found = [losses_and_gradients(shard, rows, impl, options) for impl in ("torch", "triton") for options in OPTIONS]
    found += [losses_and_gradients(shard, rows, "triton", options | {"products": "torch"}) for options in OPTIONS[1:3]]
    found += [plain_loss_and_gradient(shard, rows, impl, options) for impl in ("torch", "triton") for options in PLAIN]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_a_shard_each_equal_one_with_the_whole_head(world: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(world), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world)]
    assert [process.wait(timeout=900) for process in processes] == [0] * world
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    expected_of = [losses_and_gradients(None, slice(None), "reference", options) for options in OPTIONS] * 2
    expected_of += expected_of[1:3]
    expected_of += [plain_loss_and_gradient(None, slice(None), "torch", options) for options in PLAIN] * 2
    assert len(expected_of) == len(ranks[0])
    for case, whole in enumerate(expected_of):
        for found in ranks:
            for got, expected in zip(found[case][:-1], whole[:-1], strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
            assert torch.equal(found[case][0], ranks[0][case][0]), "the loss is bitwise the same on every rank"
        torch.testing.assert_close(torch.cat([found[case][-1] for found in ranks]), whole[-1], rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    run_rank(int(sys.argv[3]), int(sys.argv[1]), sys.argv[2])
