"""Chooses which implementation runs, for all kernels.

    choose("attention", "auto", device, usable, packed=True) -> "triton"

`impl="auto"` reads the shipped table tuning/dispatch.json from the top: the first rule that fits the device, then the first of
its choices that the kernel says is usable here (installed, and able to do what is asked). The table is pinned, never measured
at run time: every rank of a job takes the same decision. A choice is logged once per kernel and reason. Any other `impl` is
used as given; where it cannot work, the error says why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from .interpreter import is_interpreting

TABLE = Path(__file__).resolve().parent / "tuning" / "dispatch.json"
log = logging.getLogger("chatmill.kernels")
F = TypeVar("F", bound=Callable[..., Any])
Impl = Literal["auto", "triton", "torch", "reference"]  # of every kernel but attention


def _read_table() -> dict[str, list[dict[str, Any]]]:
    raw = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: rules for name, rules in raw.items() if name != "note"}


_TABLE = _read_table()  # at import: Dynamo cannot trace reading a file


def constant_in_graphs(function: F) -> F:
    """What torch.compiler.assume_constant_result does, without its import of torch._dynamo: it takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def shipped_table() -> dict[str, list[dict[str, Any]]]:
    """Rules per kernel, in order."""
    return _TABLE


@constant_in_graphs  # outside the cache, because Dynamo traces through a cache with a warning
def capability(device: torch.device) -> int:
    """Compute capability as one number (90 = Hopper); 0 if the device is not a CUDA GPU."""
    return _capability(device)


@functools.lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@constant_in_graphs
def is_installed(module: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    return _is_installed(module)


@functools.lru_cache(maxsize=16)
def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


@constant_in_graphs
def import_problem(module: str, symbol: str) -> str:
    """Why a module cannot be used, or "" where it was imported and has the symbol. One that is there and broken warns once."""
    return _import_problem(module, symbol)


@functools.lru_cache(maxsize=16)
def _import_problem(module: str, symbol: str) -> str:
    try:
        getattr(importlib.import_module(module), symbol)
    except Exception as problem:  # a wheel for another torch or machine may raise anything
        if isinstance(problem, ModuleNotFoundError) and problem.name in (module, module.split(".")[0]):
            return f"{module} is not installed"
        why = f"{module} is installed but cannot be used: {type(problem).__name__}: {problem}"
        log.warning("%s. Another engine is used; reinstall it, or ignore this.", why)
        return why
    return ""


@contextlib.contextmanager
def planning_for_gpu() -> Iterator[None]:
    """Inside this context Triton counts as usable everywhere: for tracing shapes with fake tensors, where no kernel runs."""
    _planning.append(True)
    try:
        yield
    finally:
        _planning.pop()


_planning: list[bool] = []


def is_planning() -> bool:
    """Whether only shapes are traced, see planning_for_gpu."""
    return bool(_planning)


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device; None where they can."""
    if _planning:
        return None
    if not is_installed("triton"):
        return "triton is not installed"
    if device.type not in ("cpu", "cuda"):
        return f"there is no Triton for {device.type}"
    if device.type == "cpu" and not is_interpreting():
        return "CPU tensors need TRITON_INTERPRET=1 (the interpreter, for tests)"
    if device.type == "cuda" and torch.version.hip is None and capability(device) < 80:
        return f"compute capability {capability(device)} is below 80"
    return import_problem("triton", "jit") or None


P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """For functions that launch Triton kernels: run on the GPU of their first tensor argument (also one in a list).

    Triton launches on the current device and its stream, wherever the pointers are. With a model on cuda:1 and cuda:0 current
    that is an illegal access, or an unordered one over peer access. torch's own operators guard against it, custom ones do
    not.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        _keep_fusion()
        device = _first_device(args)
        if device is None or device.type != "cuda":
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return guarded


@functools.cache
def _keep_fusion() -> None:
    """Let triton contract a * b + c into one instruction, as it does by default until 3.9; 3.10 does not (pull request 11270).

    Our kernels are written for it: a step of attention has one such instruction for every score (docs/kernels-attention.md).
    Where TRITON_DEFAULT_FP_FUSION is set, that holds.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def _first_device(values: Any) -> torch.device | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, (list, tuple)) and (found := _first_device(value)) is not None:
            return found
    return None


Obstacle = str | None | Callable[[], str | None]


def choose(kernel: str, impl: str, device: torch.device, obstacles: Mapping[str, Obstacle], *, packed: bool = False) -> str:
    """Implementation to run.

    obstacles: for each implementation of the kernel, why it cannot do this call, or None if it can; or a function that says so,
    which is asked only where the table gets to it.
    packed: several documents in one row (attention only).
    Raises ValueError with the reason if `impl` is unknown or cannot work here.
    """
    if impl != "auto":
        if impl not in obstacles:
            raise ValueError(f"{kernel}: impl={impl!r} is unknown; choose auto or one of {', '.join(sorted(obstacles))}.")
        reason = _reason(obstacles[impl])
        if reason is not None:
            raise ValueError(f"{kernel}: impl={impl!r} cannot do this: {reason}. Set impl=auto to let the table choose.")
        return impl
    number = capability(device)
    for rule in shipped_table()[kernel]:
        low, high = rule.get("capability", (0, 10_000))
        if rule["device"] not in ("any", device.type) or not low <= number <= high or rule.get("packed", packed) != packed:
            continue
        passed: list[str] = []
        for candidate in (c for c in rule["choose"] if c in obstacles):
            reason = _reason(obstacles[candidate])
            if reason is None:
                if not torch.compiler.is_compiling():
                    _log_once(kernel, candidate, str(device.type), number, packed, tuple(passed))
                return candidate
            passed.append(f"{candidate}: {reason}")
    raise ValueError(
        f"{kernel}: nothing in {TABLE.name} can do this on {device}: { {name: _reason(o) for name, o in obstacles.items()} }."
    )


def _reason(obstacle: Obstacle) -> str | None:
    return obstacle() if callable(obstacle) else obstacle


@functools.lru_cache(maxsize=256)
def _log_once(kernel: str, candidate: str, device: str, number: int, packed: bool, passed: tuple[str, ...]) -> None:
    machine = device if not number else f"{device} sm_{number}"
    kind = " packed" if packed else ""
    log.info("%s%s on %s: %s%s", kernel, kind, machine, candidate, f" (not {'; '.join(passed)})" if passed else "")
