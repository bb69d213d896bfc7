"""Calls torch operators of ours without the dispatcher where nobody needs it: in plain eager code.

    attention_forward = direct(operator, setup, backward)       the same arguments, results and gradients as operator(...)

A custom operator is seen by torch.compile, fake tensors, selective checkpointing and FLOP counters. That costs a third of a
call's host time (python -m chatmill.kernels.bench.host_time). Where there is no tracing, dispatch mode or tensor subclass, an
autograd.Function around the same body does the same for less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., Any]
_through_dispatcher: list[bool] = []


@contextlib.contextmanager
def through_dispatcher() -> Iterator[None]:
    """Inside this context every call takes the operator: to compare."""
    _through_dispatcher.append(True)
    try:
        yield
    finally:
        _through_dispatcher.pop()


def is_plain(inputs: Sequence[Any]) -> bool:
    """Whether nothing watches operators and all tensors are plain ones, so that the dispatcher could only call the body."""
    if torch.compiler.is_compiling() or _through_dispatcher or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._are_functorch_transforms_active():  # vmap, grad and the like
        return False
    for x in inputs:
        kind = type(x)
        if kind is not Tensor and kind is not torch.nn.Parameter and isinstance(x, Tensor):
            return False
    return True


def direct(operator: Any, setup: Setup | None = None, backward: Backward | None = None) -> Callable[..., Any]:
    """A function with the operator's arguments; setup and backward: what it registered, None where it has no gradient.

    operator: of torch.library.custom_op. One without a gradient is called directly only where none is recorded, so that
    differentiating twice still meets torch's error.
    """
    body = operator._init_fn
    if setup is None or backward is None:
        return lambda *inputs: body(*inputs) if not torch.is_grad_enabled() and is_plain(inputs) else operator(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = body(*inputs)
        setup(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(operator._qualname, (torch.autograd.Function,), members)  # a profile shows the operator's name

    def call(*inputs: Any) -> Any:
        if not is_plain(inputs):
            return operator(*inputs)
        return function.apply(*inputs) if torch.is_grad_enabled() else body(*inputs)

    return call
