"""Starts Triton kernels with less work on the host: a call like one that came before starts that one's build.

    launch(kernel, grid, *arguments, **constants)               does what kernel[grid](*arguments, **constants) does

Triton's own launch binds the arguments, reads a dozen settings, describes every argument, makes a text of the options and
looks the build up by it: 12 to 36 us for one of ours. Here a call is known by what it passes. Two calls are alike if for every
tensor the dtype and the address modulo 16 agree, and for everything else the type and the value, on the same device and driver.
That is stricter than Triton's rules (alignment by 16, the value 1, the width of integers), so none of them is repeated here:
for two calls that are alike Triton can only take the same build. All others go through Triton, and so do those with another
kind of argument.

Triton's settings (TRITON_DEBUG and the like) are those of the first of such calls. Where something watches launches (proton's
hooks), every call goes through Triton. Interpreted kernels run with bf16 as it should be (interpreter.py).
Measure: python -m chatmill.kernels.bench.host_time
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .interpreter import install, is_interpreting

# calls that are remembered: token counts differ from batch to batch, and each is a call of its own
MOST = 16_384
_PLAIN = (bool, float, type(None), torch.dtype)


class _Build(NamedTuple):
    """What a call starts. held: kernel and driver, so that their ids stay theirs."""

    start: Callable[..., None]
    function: Any
    packed_metadata: Any
    constants: tuple[Any, ...]
    held: tuple[Any, Any]


_builds: dict[Hashable, _Build] = {}
_by_triton: list[bool] = []


@contextlib.contextmanager
def launched_by_triton() -> Iterator[None]:
    """Inside this context every launch goes through Triton: to compare."""
    _by_triton.append(True)
    try:
        yield
    finally:
        _by_triton.pop()


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants). grid: 1 to 3 numbers of programs."""
    if type(kernel) is not JITFunction or _by_triton or kernel.pre_run_hooks or _is_watched():
        if is_interpreting():
            install()
        kernel[grid](*arguments, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    called = call_key(arguments, constants)
    key = None if called is None else (id(kernel), id(active), device, called)
    build = _builds.get(key)
    if build is not None:
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        # the three: nothing watches, see above
        build.start(x, y, z, stream, build.function, build.packed_metadata, None, None, None, *arguments, *build.constants)
        return
    built = kernel[grid](*arguments, **constants)
    names = kernel.arg_names[len(arguments) :]
    if key is not None and isinstance(built, CompiledKernel) and all(name in constants for name in names):
        if len(_builds) >= MOST:
            _builds.clear()
        values = tuple(constants[name] for name in names)
        _builds[key] = _Build(built.run, built.function, built.packed_metadata, values, (kernel, active))


def call_key(arguments: Sequence[Any], constants: dict[str, Any]) -> Hashable | None:
    """What two calls must have in common to start the same build; None where there is an argument of another kind."""
    parts: list[Any] = []
    for x in arguments:
        kind = type(x)
        if kind is int:
            parts.append(x)
        elif kind is Tensor or kind is torch.nn.Parameter:
            parts += x.dtype, x.data_ptr() & 15
        elif kind in _PLAIN:
            parts.append((kind, x))
        else:
            return None
    for name, x in constants.items():
        kind = type(x)
        if kind is not int and kind is not str and kind not in _PLAIN:
            return None
        parts += name, kind, x
    return tuple(parts)


def _is_watched() -> bool:
    """Whether somebody wants to be called at launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool((enter is not None and enter.calls) or (leave is not None and leave.calls))
