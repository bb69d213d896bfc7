"""The cross-entropy and the layer's kernels on a real GPU: full sizes, memory, no wait for the host, torch.compile.

    pytest -m gpu tests/kernels/layer/test_layer_gpu.py

The other tests of these kernels run compiled there too; these need its size or its clock.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatmill.kernels.cross_entropy import cross_entropy, linear_cross_entropy, linear_cross_entropy_with_metrics
from chatmill.kernels.layer.rms_norm import rms_norm
from chatmill.kernels.layer.rope import rope, rope_reference
from chatmill.kernels.layer.swiglu import swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def problem(N: int, H: int, V: int, share: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, H, device="cuda") / H**0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, V, (N,), device="cuda")
    keep = torch.randperm(N, device="cuda")[: round(N * share)].sort().values
    targets = torch.full_like(targets, -100).index_copy(0, keep, targets[keep])
    rows = torch.full((-(-len(keep) // 128) * 128,), -1, device="cuda", dtype=torch.int32)
    rows[: len(keep)] = keep.int()
    return hidden, weight, targets, rows


def error(got: Tensor | None, exact: Tensor | None) -> float:
    assert got is not None and exact is not None
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def milliseconds(run: Any) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=200, return_mode="median"))


@pytest.mark.parametrize(("N", "H", "V"), [(4096, 2048, 128256), (3000, 576, 49152), (1000, 2048, 151_937), (300, 1021, 50257)])
def test_full_size_errs_at_most_twice_as_much_as_pytorch(N: int, H: int, V: int) -> None:
    hidden, weight, targets, rows = problem(N, H, V, share=0.5)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].T, targets).backward()
    theirs = torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), targets), (hidden, weight))
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, rows=rows, impl="triton"), (hidden, weight))
    for mine, their, truth in zip(ours, theirs, exact, strict=True):
        assert torch.isfinite(mine).all()
        assert error(mine, truth.grad) <= 2 * error(their, truth.grad)


def test_many_chunks_and_one_chunk_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accumulation kernel against the single product of the vendor's library."""
    from chatmill.kernels.cross_entropy import tiles as kernels

    hidden, weight, targets, rows = problem(4096, 2048, 32000)
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, rows=rows, impl="triton"), (hidden, weight))
    monkeypatch.setattr(kernels, "chunk_rows", lambda *_: 512)
    chunked = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, rows=rows, impl="triton"), (hidden, weight))
    for a, b in zip(whole, chunked, strict=True):
        assert error(b, a) < 4e-3


def test_both_forms_of_the_products_agree_and_err_alike() -> None:
    """Chunks of rows, an fp32 and a bf16 head: torch's products against the tier's own, both against fp64."""
    hidden, weight, targets, rows = problem(4096, 1024, 32000)
    for head in (weight, weight.detach().float().requires_grad_()):
        wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
        exact = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, targets), wide)
        for products in ("triton", "torch"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("chatmill.kernels.cross_entropy.tiles.chunk_rows", lambda *_: 1024)
                loss = linear_cross_entropy(hidden, head, targets, rows=rows, impl="triton", products=products)  # type: ignore[arg-type]
                found = torch.autograd.grad(loss, (hidden, head))
            assert all(error(a, b) < 1e-2 for a, b in zip(found, exact, strict=True)), products


@pytest.mark.parametrize("products", ["triton", "torch"])
def test_given_rows_nothing_waits_for_the_gpu(products: str) -> None:
    hidden, weight, targets, rows = problem(2048, 1024, 32000, share=0.4)
    scale = torch.ones(1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    options: dict[str, Any] = {"rows": rows, "norm_weight": scale, "impl": "triton", "products": products}
    linear_cross_entropy(hidden, weight, targets, **options).backward()  # compile first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = linear_cross_entropy_with_metrics(hidden, weight, targets, **options)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_extra_memory_of_a_training_step_stays_under_1300_megabytes() -> None:
    hidden, weight, targets, rows = problem(16384, 2048, 128256)

    def step() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, rows=rows, impl="triton"), (hidden, weight))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    own = weight.numel() * 2 + hidden.numel() * 2  # the gradients themselves
    assert torch.cuda.max_memory_allocated() - before - own < 1.3e9


def test_time_follows_the_share_of_tokens_with_loss() -> None:
    times = {}
    for share in (1.0, 0.2):
        hidden, weight, targets, rows = problem(16384, 2048, 128256, share)
        times[share] = milliseconds(
            lambda x=hidden, w=weight, t=targets, r=rows: torch.autograd.grad(
                linear_cross_entropy(x, w, t, rows=r, impl="triton"), (x, w)
            )
        )
    assert times[0.2] < 0.3 * times[1.0], times


def test_results_are_bitwise_repeatable_at_full_size() -> None:
    hidden, weight, targets, rows = problem(8192, 2048, 128256, share=0.7)
    first, second = (
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, rows=rows, impl="triton"), (hidden, weight))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_place_cross_entropy_needs_no_second_copy_of_the_logits() -> None:
    logits = torch.randn(4096, 128256, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 128256, (4096,), device="cuda")
    z = logits.requires_grad_() * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy(z, targets, inplace=True, impl="triton")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.1 * logits.numel() * 2


def test_layer_kernels_at_model_sizes_err_at_most_twice_as_much_as_pytorch() -> None:
    torch.manual_seed(0)
    T, H, D = 4096, 4096, 128
    x, w = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((T, H), (H,)))
    gate, up = (torch.randn(T, 14336, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(T, 32, D, device="cuda", dtype=torch.bfloat16)
    angles = torch.arange(T, device="cuda")[:, None] * 1e4 ** (-torch.arange(D // 2, device="cuda") / (D // 2))
    cos, sin = angles.cos(), angles.sin()
    trials: list[tuple[Any, Any, list[Tensor]]] = [
        (lambda a, b: rms_norm(a, b, 1e-6, impl="triton"), lambda a, b: F.rms_norm(a, (H,), b, 1e-6), [x, w]),
        (lambda a, b: swiglu(a, b, impl="triton"), lambda a, b: F.silu(a) * b, [gate, up]),
        (lambda a: rope(a, a, cos, sin, impl="triton")[0], lambda a: rope_reference(a, a, cos, sin)[0], [q]),
    ]
    for mine, theirs, inputs in trials:
        upstream = torch.randn_like(mine(*inputs))
        found = []
        for run, dtype in ((mine, torch.bfloat16), (theirs, torch.bfloat16), (theirs, torch.float64)):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
            out = run(*leaves)
            found.append([out, *torch.autograd.grad(out, leaves, upstream.to(dtype))])
        for ours, their, exact in zip(*found, strict=True):
            assert error(ours, exact) <= 2 * error(their, exact) + 1e-5


@pytest.mark.parametrize("backend", ["inductor"])
def test_a_layer_with_all_kernels_compiles_without_a_graph_break(backend: str) -> None:
    hidden, weight, targets, rows = problem(512, 256, 8192, share=0.5)
    scale = torch.ones(256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y, h = rms_norm(x, s, 1e-6, x * 2, impl="triton")
        z = swiglu(y, h, impl="triton")
        return linear_cross_entropy(z, w, targets, rows=rows, impl="triton")

    leaves = (hidden, weight, scale)
    eager = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(step, backend=backend, fullgraph=True)(*leaves), leaves)
    for a, b in zip(compiled, eager, strict=True):
        assert error(a, b) < 2e-2
