"""Kernels called past the dispatcher: the same bits, and the operator itself wherever somebody watches operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from chatmill.kernels.attention.interface import attention
from chatmill.kernels.eager import direct, is_plain, through_dispatcher
from chatmill.kernels.layer.rms_norm import rms_norm
from chatmill.kernels.layer.rope import rope
from chatmill.kernels.layer.swiglu import swiglu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, device=DEVICE).requires_grad_() for shape in shapes]


def turned(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.arange(48.0, device=DEVICE).view(6, 8)
    return rope(q, k, angles.cos(), angles.sin(), q_norm=w, impl="triton")


CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w, r: rms_norm(x, w, 1e-6, r, impl="triton"), [(5, 24), (24,), (5, 24)]),
    "rope": (turned, [(6, 2, 16), (6, 1, 16), (16,)]),
    "swiglu": (lambda g, u: swiglu(g, u, impl="triton"), [(5, 40), (5, 40)]),
    "attention_forward": (
        lambda q, k, v: attention(q, k, v, impl="triton", return_lse=True),
        [(9, 2, 16), (9, 1, 16), (9, 1, 16)],
    ),
}


def results(run: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    out = run(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])]


class Names(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_both_ways_give_the_same_bits_and_a_mode_sees_the_operator(name: str) -> None:
    run, shapes = CALLS[name]
    leaves = tensors(*shapes)
    plain = results(run, leaves)
    with through_dispatcher():
        whole = results(run, leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))
    with Names() as names:
        results(run, leaves)
    assert f"chatmill::{name}" in names.seen


class Counted:
    """A custom operator whose calls are counted."""

    def __init__(self, operator: Any) -> None:
        self._operator, self._init_fn, self._qualname, self.calls = operator, operator._init_fn, operator._qualname, 0

    def __call__(self, *inputs: Any) -> Any:
        self.calls += 1
        return self._operator(*inputs)


@torch.library.custom_op("chatmill_test::doubled", mutates_args=())
def doubled(x: Tensor, times: int) -> Tensor:
    return x * (2 * times)


doubled.register_fake(lambda x, times: torch.empty_like(x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.times = inputs[1]


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * (2 * ctx.times), None


doubled.register_autograd(_back, setup_context=_keep)


def test_the_dispatcher_is_passed_only_where_nothing_watches() -> None:
    operator = Counted(doubled)
    run = direct(operator, _keep, _back)
    (x,) = tensors((3,))
    assert torch.equal(run(x, 2), 4 * x) and torch.equal(run(torch.nn.Parameter(x), 2), 4 * x) and operator.calls == 0
    with torch.no_grad():
        assert not run(x, 2).requires_grad and operator.calls == 0
    with Names():
        run(x, 2)
    assert operator.calls == 1
    fake = FakeTensorMode().from_tensor(x)
    assert not is_plain((fake, 2)) and run(fake, 2).shape == (3,) and operator.calls == 2
    inside: list[bool] = []
    torch.func.vmap(lambda y: inside.append(is_plain((y,))) or y)(x)
    assert inside == [False] and is_plain((x, 2))
    assert torch.equal(torch.compile(lambda y: run(y, 2), backend="eager", fullgraph=True)(x), 4 * x)


def test_differentiating_twice_is_refused_and_not_answered_with_less() -> None:
    gate, up = tensors((5, 40), (5, 40))
    (first,) = torch.autograd.grad(swiglu(gate, up, impl="triton").sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (first.sum() + up.sum()).backward()
