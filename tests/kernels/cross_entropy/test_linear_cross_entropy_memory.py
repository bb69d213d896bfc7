"""How much memory the fused loss takes beside the gradients that it returns, and how much work it does.

At full size the host code runs on the meta device, where every tensor has its size and none has memory; only the launches of
Triton kernels, which allocate nothing, are left out. At a small size they run.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from chatmill.kernels.cross_entropy import interface, operators, row_statistics
from chatmill.kernels.cross_entropy import tiles as shapes
from chatmill.kernels.cross_entropy import torch_tier as plain
from chatmill.kernels.cross_entropy import triton_tier as kernels
from chatmill.kernels.cross_entropy import weight_gradient as head
from chatmill.kernels.cross_entropy.interface import linear_cross_entropy
from chatmill.kernels.dispatch import planning_for_gpu

V, H, N = 128_256, 2048, 16_384
PROMISE = 1.3e9  # bytes: the target for one H200


class Peak(TorchDispatchMode):
    """Bytes of all storages that were made since the start and are alive; the most there were."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._seen:
                storage, size = value.untyped_storage(), value.untyped_storage().nbytes()
                self._seen.add(storage._cdata)
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._forget, storage._cdata, size).atexit = False
        return out

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


class NoLaunch:
    """Stands in for a Triton kernel: launched, it does nothing. It counts the programs of all launches."""

    def __init__(self) -> None:
        self.programs: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.programs.append(grid[0])
        return lambda *args, **options: None


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> dict[str, NoLaunch]:
    """Every Triton kernel by name, made silent."""
    found = {
        name: NoLaunch()
        for name in (
            "cross_entropy_project_kernel",
            "cross_entropy_statistics_kernel",
            "cross_entropy_gradient_kernel",
            "cross_entropy_accumulate_kernel",
        )
    }
    for name, silent in found.items():
        module = next(m for m in (kernels, row_statistics, head) if hasattr(m, name))
        monkeypatch.setattr(module, name, silent)
    return found


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public function on the meta device, with the operator's own body in place of the operator.

    An operator shows neither its memory nor its products to a dispatch mode. The meta device knows no autocast.
    """
    body = operators.sum_op._init_fn

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return body(*(a.detach() if isinstance(a, Tensor) else a for a in args))

    monkeypatch.setattr(interface, "sum_op", run)
    row = shapes.row_for(90, 2)
    monkeypatch.setattr(shapes, "tiles", lambda *_: (row.project, row.accumulate))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    with planning_for_gpu():
        yield


def step(
    impl: str, n_rows: int, weight_dtype: torch.dtype = torch.bfloat16, norm: bool = False, products: Any = "auto"
) -> Peak:
    """A training step's forward on the meta device; fp32 weights under autocast to bf16."""
    meta = torch.device("meta")
    narrow = torch.bfloat16 if weight_dtype is torch.float32 else weight_dtype
    hidden = torch.empty(N, H, dtype=narrow, device=meta, requires_grad=True)
    weight = torch.empty(V, H, dtype=weight_dtype, device=meta, requires_grad=True)
    scale = torch.empty(H, dtype=narrow, device=meta, requires_grad=True) if norm else None
    rows = torch.empty(n_rows, dtype=torch.int32, device=meta)
    with Peak(hidden, weight, rows) as peak:
        linear_cross_entropy(
            hidden,
            weight,
            torch.empty(N, dtype=torch.int64, device=meta),
            rows=rows,
            norm_weight=scale,
            impl=impl,
            products=products,
        )
    return peak


def gradients(n_rows: int, weight_dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of what is returned: d_weight, and d_x of the rows."""
    return V * H * weight_dtype.itemsize + n_rows * H * 2


@pytest.mark.parametrize("n_rows", [N, N // 2, 2432])
@pytest.mark.parametrize("norm", [False, True])
def test_the_extra_memory_of_a_step_with_a_vocabulary_of_128k_is_what_was_promised(
    n_rows: int, norm: bool, unlaunched: dict[str, NoLaunch], on_meta: None
) -> None:
    extra = step("triton", n_rows, norm=norm).most - gradients(n_rows)
    halves, logits = V * H * 2, shapes.logits_bytes(n_rows, V, 2)
    assert halves + logits < extra < min(PROMISE, halves + logits + (3 if norm else 1) * n_rows * H * 2 + 30e6)
    assert len(unlaunched["cross_entropy_accumulate_kernel"].programs) == -(-n_rows // shapes.chunk_rows(n_rows, V, 2)) > 1


@pytest.mark.parametrize(("impl", "products"), [("torch", "auto"), ("triton", "auto"), ("triton", "torch")])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_tier_keeps_the_promise_for_weights_of_either_width(
    impl: str, products: str, weight_dtype: torch.dtype, unlaunched: dict[str, NoLaunch], on_meta: None
) -> None:
    """fp32 weights are what DDP trains: their sums are the gradient itself, but a bf16 copy of the weight is made."""
    assert step(impl, N, weight_dtype, products=products).most - gradients(N, weight_dtype) < PROMISE


def test_what_kernels_really_run_on_takes_what_the_accounting_says(on_meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tensors and launched kernels, three chunks: the storages are those that the meta device counted."""
    rows, width, vocabulary = 384, 128, 1600
    row = dataclasses.replace(shapes.row_for(90, 2), logits_bytes=128 * 1664 * 2)
    monkeypatch.setattr(shapes, "row_for", lambda *_: row)
    monkeypatch.setattr(shapes, "tiles", lambda *_: (shapes.Tile(128, 256, 128, 8, 1), shapes.Tile(256, 128, 128, 8, 1)))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / 8).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    keep = torch.arange(rows, dtype=torch.int32)
    with Peak(hidden, weight, targets, keep) as peak:
        linear_cross_entropy(hidden, weight, targets, rows=keep, impl="triton")
    own = vocabulary * width * 2 + rows * width * 2
    halves, logits, gathered = vocabulary * width * 2, 128 * 1664 * 2, rows * width * 2
    assert own + halves + logits < peak.most < own + halves + logits + 2 * gathered + 50_000


def test_scaling_a_gradient_in_backward_makes_one_new_tensor_of_its_size() -> None:
    """A product with an fp32 factor is fp32: of d_weight that would be 1 GB beside it."""
    gradient, factor = torch.randn(3001, 64).bfloat16(), torch.tensor(1 / 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "SCALED_ELEMENTS", 100 * 64)
        with Peak(gradient, factor) as peak:
            scaled = operators._scaled(gradient, factor)
    assert torch.equal(scaled, (gradient.float() * factor).bfloat16())
    assert peak.most < gradient.nbytes + 3 * 100 * 64 * 4


def work(share: float, impl: str, unlaunched: dict[str, NoLaunch]) -> float:
    """FLOPs of all products of a step in which this share of the tokens carries loss."""
    for silent in unlaunched.values():
        silent.programs.clear()
    with FlopCounterMode(display=False) as counter:
        step(impl, round(N * share))
    flops = float(counter.get_total_flops())
    if impl == "triton":
        project, add = shapes.tiles()
        flops += sum(unlaunched["cross_entropy_project_kernel"].programs) * 2 * project.rows * project.columns * H
        launches = unlaunched["cross_entropy_accumulate_kernel"].programs
        flops += sum(launches) * 2 * add.rows * add.columns * round(N * share) / len(launches)
    return flops


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_work_is_proportional_to_the_share_of_tokens_with_loss(
    impl: str, unlaunched: dict[str, NoLaunch], on_meta: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "CHUNK_BYTES", 1 << 30)
    whole = 6 * N * H * V
    for share in (1.0, 0.5, 0.25):
        assert work(share, impl, unlaunched) == pytest.approx(share * whole, rel=2e-3)
