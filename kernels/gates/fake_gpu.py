"""A CUDA GPU that is not there: everything a launch does up to the driver, on a machine without one.

    with fake_gpu(90) as gpu:
        rms_norm(x, weight)             # CPU tensors that call themselves cuda tensors; dispatch chooses as on a Hopper
    gpu.launches                        # what would have been started: grid, warps, shared memory, registers, stack

Inside, the project's own host code and triton's own launch path run as they are: dispatch, tile tables, argument binding and
specialisation, compilation, tensor maps. Only the driver and torch.cuda are replaced. A launch that the driver would refuse
raises LaunchError: a grid beyond the limits, a tensor map that cuTensorMapEncodeTiled does not take, scratch memory without an
allocator. Too much shared or tensor memory, or more threads than the registers are for, raises triton's own OutOfResources.
Nothing is computed: what a kernel would write keeps what it held, and torch.mm gives memory of the right shape.

quick: compile to Triton's tile IR only, in a cache of its own. Types, constants, shapes and tensor maps are seen by then;
shared memory, registers and spills are not (cross_compile has them).
"""

# mypy: disable-error-code="no-untyped-def"
# (it answers calls of triton's that have no Python types)

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .binaries import SHARED_LIMIT, tool

MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
REGISTERS = 65_536
# CUDA programming guide, technical specifications per compute capability: the same for all of them
GRID_LIMIT = ((1 << 31) - 1, 65_535, 65_535)
# driver API, cuTensorMapEncodeTiled: bytes of the innermost box by swizzle mode (none, 32, 64 and 128 bytes)
SWIZZLE_BYTES = {0: 1 << 30, 1: 32, 2: 64, 3: 128}


class LaunchError(RuntimeError):
    """What the driver would refuse, and why."""


@dataclass(frozen=True)
class Launch:
    """One launch that would have been started. registers and stack_bytes are -1 where it was compiled quickly."""

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int


@dataclass
class FakeGpu:
    """Compute capability, whether it is compiled to tile IR only, and the launches so far."""

    arch: int
    quick: bool
    launches: list[Launch] = field(default_factory=list)


def check_grid(kernel: str, grid: Sequence[int]) -> None:
    """Raise LaunchError where the driver would."""
    for axis, size, limit in zip("xyz", grid, GRID_LIMIT, strict=True):
        if not 1 <= size <= limit:
            raise LaunchError(f"{kernel}: the grid is {tuple(grid)}; along {axis} it must be 1 to {limit}.")


def check_tensor_map(
    address: int, swizzle: int, element_bytes: int, box: Sequence[int], shape: Sequence[int], strides: Sequence[int]
) -> None:
    """Raise LaunchError where cuTensorMapEncodeTiled would refuse this map. strides: in elements, outermost first."""

    def must(holds: bool, what: str) -> None:
        if not holds:
            raise LaunchError(
                f"tensor map of shape {list(shape)}, strides {list(strides)}, {element_bytes} bytes an element, "
                f"box {list(box)}, swizzle {SWIZZLE_BYTES[swizzle]}: {what}."
            )

    must(address % 16 == 0, f"its address {address:#x} is no multiple of 16")
    must(1 <= len(box) <= 5, "it must have 1 to 5 dimensions")
    must(all(1 <= n <= 1 << 32 for n in shape), "every dimension must be 1 to 2^32")
    outer = [stride * element_bytes for stride in strides[:-1]]
    must(all(n % 16 == 0 and 0 < n < 1 << 40 for n in outer), "every outer stride must be a positive multiple of 16 below 2^40")
    must(strides[-1] == 1, "the innermost stride must be 1")
    must(all(1 <= n <= 256 for n in box), "every side of the box must be 1 to 256")
    inner = box[-1] * element_bytes
    must(inner % 16 == 0, f"the innermost side of the box has {inner} bytes, no multiple of 16")
    must(inner <= SWIZZLE_BYTES[swizzle], f"the innermost side of the box has {inner} bytes, more than the swizzle")


class _Utils:
    """The part of triton's driver that is written in C."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def load_binary(self, name, binary, shared, device):
        registers, stack = _resources(binary) if binary else (-1, -1)
        per_warp = max(1, -(-registers * 32 // 256)) * 256  # registers are given to a warp in units of 256
        threads = min(1024, REGISTERS // per_warp * 32)
        return 1, (name, registers, stack), registers, stack // 4, threads

    def get_device_properties(self, device):
        return {
            "max_shared_mem": SHARED_LIMIT[self.gpu.arch],
            "multiprocessor_count": MULTIPROCESSORS[self.gpu.arch],
            "max_num_regs": REGISTERS,
            "warpSize": 32,
        }

    def fill_tma_descriptor(self, address, swizzle, element_bytes, kind, box, shape, strides, padding):
        check_tensor_map(address, swizzle, element_bytes, box, shape, strides)
        return "tensor map"

    fill_tma_descriptor_tiled = fill_tma_descriptor  # its name from triton 3.7 on


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(binary)
        told = subprocess.run([tool("cuobjdump"), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {told[-500:]}")
    return int(found[1]), int(found[2])


def _launcher(gpu: FakeGpu, source, metadata) -> Callable[..., None]:
    """What triton calls to start a kernel: everything is checked and nothing is started."""
    from triton.backends.nvidia import driver

    kinds = list(source.signature.items())
    # the number of its parameters differs between versions; what follows the first two is for other kinds of descriptors
    make_map = functools.partial(driver.make_tensordesc_arg)
    extra = (None,) * (make_map.func.__code__.co_argcount - 2)
    maps = getattr(metadata, "tensordesc_meta", None) or []

    def launch(x, y, z, stream, function, packed, described, enter, leave, *arguments):
        name, registers, stack = function
        check_grid(name, (x, y, z))
        for kind in ("global", "profile"):
            if size := getattr(metadata, f"{kind}_scratch_size", 0):
                raise LaunchError(f"{name}: needs {size} bytes of {kind} scratch memory, for which no allocator is set.")
        if len(arguments) != len(kinds):
            raise LaunchError(f"{name}: got {len(arguments)} arguments, compiled for {len(kinds)}.")
        if not metadata.enable_fp_fusion:
            raise LaunchError(f"{name}: compiled without fused multiply-adds; unset TRITON_DEFAULT_FP_FUSION.")
        of_map = iter(maps)
        for (argument, kind), value in zip(kinds, arguments, strict=True):
            if isinstance(kind, str) and kind.startswith("tensordesc"):
                make_map(value, next(of_map, None), *extra)
            elif kind == "i32" and not -(1 << 31) <= int(value) < 1 << 31:
                raise LaunchError(f"{name}: {argument} = {value} does not fit the 32 bits it was compiled for.")
        gpu.launches.append(Launch(name, (x, y, z), metadata.num_warps, metadata.shared, registers, stack))

    return launch


def _driver(gpu: FakeGpu) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    class Driver(GPUDriver):
        def __init__(self) -> None:
            self.utils = _Utils(gpu)
            self.launcher_cls = functools.partial(_launcher, gpu)
            self.get_device_capability = lambda device=0: divmod(gpu.arch, 10)
            self.get_current_stream = lambda device=0: 0
            # triton keeps compiled kernels by this value: one for each kind of GPU and of compilation
            self.get_current_device = lambda: (gpu.arch, gpu.quick)
            self.set_current_device = lambda device: None

        def get_current_target(self):
            return GPUTarget("cuda", gpu.arch, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        @staticmethod
        def is_active():
            return True

        def map_python_to_cpp_type(self, kind):
            return kind

        def get_benchmarker(self):
            raise NotImplementedError("nothing can be timed here")

        def get_empty_cache_for_benchmark(self):
            raise NotImplementedError("nothing can be timed here")

    return Driver()


def _stop_at_tile_ir(*arguments: Any) -> tuple[str, str] | None:
    """Hook of triton's pipeline: what follows the tile IR only fills in the metadata."""
    if not arguments:  # asked for a key, from triton 3.7 on
        return "tile IR only", "tile IR only"
    stages = arguments[1]

    def skip(module, metadata):
        zero = ("shared", "global_scratch_size", "profile_scratch_size", "tmem_size")
        one = ("global_scratch_align", "profile_scratch_align")
        name = re.search(r"tt\.func public @(\w+)", str(module))
        metadata |= dict.fromkeys(zero, 0) | dict.fromkeys(one, 1) | {"name": name[1] if name else "kernel"}
        return ""

    for stage in list(stages):
        if stage not in ("ttir", "glir", "ttgir"):
            stages[stage] = (lambda module, metadata: b"") if stage == "cubin" else skip if stage == "llir" else lambda *_: ""
    return None


@contextlib.contextmanager
def fake_gpu(arch: int, quick: bool = False) -> Iterator[FakeGpu]:
    """This process has a GPU of that compute capability while this is open, see the header. Not for several threads."""
    import triton
    from triton import knobs

    gpu = FakeGpu(arch, quick)
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.runtime.scope())
        stack.enter_context(knobs.cache.scope())
        if quick:
            knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
            knobs.runtime.add_stages_inspection_hook = _stop_at_tile_ir
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _driver(gpu)))
        for change in _cuda_tensors(gpu):
            stack.enter_context(change)
        yield gpu


def _cuda_tensors(gpu: FakeGpu) -> list[Any]:
    """Changes to torch after which tensors lie on the fake GPU. Its number is its capability: caches by device stay right."""
    device, cpu = torch.device("cuda", gpu.arch), torch.device("cpu")
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS[gpu.arch], name=f"fake sm_{gpu.arch}")

    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def made(*values: Any, **options: Any) -> Any:
            if options.get("device") is not None:
                options["device"] = cpu
            return function(*(cpu if isinstance(value, torch.device) else value for value in values), **options)

        return made

    def mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None, out_dtype: torch.dtype | None = None):
        if a.dtype != b.dtype or a.shape[1] != b.shape[0]:
            raise LaunchError(f"torch.mm: got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}.")
        return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype) if out is None else out

    def addmm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None, out_dtype=None):
        return mm(a, b, out=total if out is None else out)

    makers = ("empty", "zeros", "ones", "full", "arange", "tensor", "empty_strided")
    cuda = {
        "device": lambda device: contextlib.nullcontext(),
        "get_device_capability": lambda device=None: divmod(gpu.arch, 10),
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device=None: None,
    }
    return [
        *(mock.patch.object(torch, name, on_cpu(getattr(torch, name))) for name in makers),
        *(mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()),
        mock.patch.object(torch, "mm", mm),
        mock.patch.object(torch, "addmm", addmm),
        mock.patch.object(torch.Tensor, "to", on_cpu(torch.Tensor.to)),
        mock.patch.object(torch.Tensor, "record_stream", lambda self, stream: None),
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True), create=True),
        mock.patch.object(torch.Tensor, "device", property(lambda self: device), create=True),
    ]
