"""Runs a warp-specialised Gluon kernel in Python, barrier by barrier: the proof of its synchronisation without a GPU.

    run = Simulated(attention_hopper, "attention_forward_hopper_kernel", seed=3)
    run[(4,)](q_desc, k_desc, v_desc, out, lse, ..., num_warps=4)      # in place of the kernel; writes out and lse

The module's own jit functions are executed, with `gl`, `tma`, `mbarrier`, `warpgroup_mma` .. of their scope replaced. Each
partition is a thread, of which exactly one runs; before every barrier, TMA or wgmma operation it hands over to a scheduler that
picks the next thing to happen by a seeded generator: a partition, the landing of a TMA load, the end of a wgmma. The seed also
sets how fast each of them is against the others, so that schedules are lopsided. What is modelled:

* mbarriers: arrival count, expected bytes, phase, wait by parity; too many arrivals or bytes are an error.
* TMA loads: the place turns NaN when one is issued and takes the data when it lands, zero outside the tensor.
* wgmma: reads its shared operands when it ends, between issue and `warpgroup_mma_wait`; its result is no tensor before.
* happens-before: vector clocks through barriers and waits. A load over a place whose readers are not known to be done, or a
  product of a place not known to be filled, is a RaceError even where this schedule got away with it.
* deadlock: nobody can go on; names who waits for which barrier and phase.
* global memory: an access outside a tensor, and a second store to one element, are errors.

Not modelled: threads within a partition (the compiler puts a barrier of the warp group before each arrival), layouts, fences,
registers, 32-bit overflow, time.
"""

from __future__ import annotations
import __future__

import inspect
import linecache
import random
import re
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from tests.kernels.attention.gluon_memory import (
    Barrier,
    Blocks,
    Clock,
    DeadlockError,
    Place,
    Pointer,
    Shared,
    SimulationError,
    join,
    load,
    store,
)  # fmt: skip
from torch import Tensor
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

Edits = Mapping[str, tuple[str, str]]


class _Abandoned(BaseException):
    """Unwinds the threads that are left after an error."""


@dataclass
class Going:
    """An asynchronous wgmma."""

    name: str
    clock: Clock
    compute: Callable[[], Tensor]
    result: Tensor | None = None

    def end(self) -> None:
        if self.result is None:
            self.result = self.compute()


@dataclass
class Load:
    """A TMA load under way."""

    name: str
    clock: Clock
    place: Place
    block: Tensor
    barrier: Barrier

    def end(self) -> None:
        self.place.data.copy_(self.block)
        self.barrier.land(self.block.numel() * self.block.element_size(), self.clock)


class Partition:
    """One partition of warp_specialize, on a thread of its own."""

    def __init__(self, name: str, body: Callable[[], None], machine: Machine, speed: float) -> None:
        self.name, self.machine, self.speed = name, machine, speed
        self.clock: Clock = {name: 1}
        self.going: list[Going] = []
        self.waits: tuple[Barrier, int] | None = None
        self.finished = self.abandoned = False
        self.error: BaseException | None = None
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(body,), daemon=True)
        self.thread.start()

    def _run(self, body: Callable[[], None]) -> None:
        self.go.acquire()
        try:
            if not self.abandoned:
                body()
                if self.going:
                    raise SimulationError(f"{self.name} ends with {self.going[0].name} under way")
        except BaseException as error:  # handed to the scheduler's thread
            self.error = error
        self.finished = True
        self.machine.back.release()

    def resume(self) -> None:
        self.go.release()
        self.machine.back.acquire()

    def pause(self) -> None:
        self.machine.back.release()
        self.go.acquire()
        if self.abandoned:
            raise _Abandoned

    def fork(self, name: str) -> Clock:
        """Clock of an asynchronous operation that starts here."""
        clock = self.clock | {name: 1}
        self.clock[self.name] += 1
        return clock


class Machine:
    """One program of the grid."""

    def __init__(self, program: int, programs: int, seed: int, buffers: list[str]) -> None:
        self.program, self.programs, self.buffers = program, programs, buffers
        self.random = random.Random(seed * 1009 + program)
        self.back = threading.Semaphore(0)
        self.current: Partition | None = None
        self.partitions: list[Partition] = []
        self.loads: list[Load] = []
        self.serial = 0
        self.landing, self.ending = (self.random.choice((0.05, 1.0, 20.0)) for _ in range(2))

    # scheduling

    def step(self) -> Partition:
        """Hands over to the scheduler; returns the partition when its turn comes again."""
        partition = self.current
        assert partition is not None, "an operation outside warp_specialize"
        partition.pause()
        return partition

    def name(self, what: str) -> str:
        self.serial += 1
        return f"{what} #{self.serial}"

    def warp_specialize(self, partitions: Sequence[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        for i, (function, arguments) in enumerate(partitions):
            speed = self.random.choice((0.05, 1.0, 10.0))
            body = lambda function=function, arguments=arguments: function(*arguments)  # noqa: E731
            self.partitions.append(Partition(f"partition {i} ({function.__name__})", body, self, speed))
        try:
            while not all(partition.finished for partition in self.partitions):
                self._one_event()
            if self.loads:
                raise SimulationError(f"the program ends with {self.loads[0].name} under way")
        finally:
            for partition in self.partitions:
                partition.abandoned = True
                while not partition.finished:
                    partition.resume()
                partition.thread.join()

    def _one_event(self) -> None:
        choices: list[tuple[float, Any]] = []
        for partition in self.partitions:
            if not partition.finished and (partition.waits is None or partition.waits[0].passes(partition.waits[1])):
                choices.append((partition.speed, partition))
            # products of one group end in order
            choices += [(self.ending, going) for going in partition.going if going.result is None][:1]
        choices += [(self.landing, load) for load in self.loads]
        if not choices:
            waiting = [f"{p.name} waits for {p.waits[0]}, parity {p.waits[1]}" for p in self.partitions if p.waits]
            raise DeadlockError("; ".join(waiting))
        chosen = self.random.choices([c for _, c in choices], [weight for weight, _ in choices])[0]
        if not isinstance(chosen, Partition):
            if isinstance(chosen, Load):
                self.loads.remove(chosen)
            chosen.end()
            return
        self.current = chosen
        chosen.resume()
        self.current = None
        if chosen.error is not None:
            raise chosen.error

    # mbarrier

    def init(self, barrier: Shared, count: int) -> None:
        barrier.places[0].count = count

    def expect(self, barrier: Shared, size: int, pred: bool = True) -> None:
        partition = self.step()
        if pred:
            barrier.places[0].bytes_missing += size
            barrier.places[0].arrive(1, partition.clock)
            partition.clock[partition.name] += 1

    def arrive(self, barrier: Shared, *, count: int = 1, pred: bool = True) -> None:
        partition = self.step()
        if pred:
            barrier.places[0].arrive(count, partition.clock)
            partition.clock[partition.name] += 1

    def wait(self, barrier: Shared, phase: int, pred: bool = True) -> None:
        partition = self.current
        assert partition is not None
        if not pred:
            return
        if phase not in (0, 1):
            raise SimulationError(f"{partition.name} waits for {barrier.places[0].name} with parity {phase}")
        partition.waits = barrier.places[0], phase
        partition.pause()
        partition.waits = None
        join(partition.clock, barrier.places[0].clock)

    # TMA

    def load_block(self, desc: Any, coordinate: Sequence[int], barrier: Shared, result: Shared) -> None:
        partition = self.step()
        place = result.places[0]
        name = self.name(f"TMA load of {place.name}")
        clock = partition.fork(name)
        place.written_by(name, clock)
        self.loads.append(Load(name, clock, place, desc.block(*coordinate), barrier.places[0]))

    # wgmma

    def mma(self, a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Any:
        partition = self.step()
        operands = [x for x in (a, b) if isinstance(x, Shared)]
        name = self.name("product of " + " and ".join(x.places[0].name for x in operands) + f" by {partition.name}")
        clock = partition.fork(name)
        for operand in operands:
            operand.places[0].read_by(name, clock)
        if not isinstance(acc, Tensor):
            raise SimulationError(f"{name}: its accumulator is still under way")
        if a.dtype != b.dtype or list(acc.shape) != [a.shape[0], b.shape[1]] or a.shape[1] != b.shape[0]:
            raise SimulationError(f"{name}: {a.dtype} {list(a.shape)} times {b.dtype} {list(b.shape)} into {list(acc.shape)}")

        def compute() -> Tensor:
            left = a.value() if isinstance(a, Shared) else a.float()
            product = left @ b.value()
            return acc + product if use_acc else product

        going = Going(name, clock, compute)
        partition.going.append(going)
        return going if is_async else self.mma_wait(0, (going,))

    def mma_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        partition = self.step()
        while len(partition.going) > outstanding:
            ended = partition.going.pop(0)
            ended.end()
            join(partition.clock, ended.clock)
        values = []
        for dep in deps:
            if isinstance(dep, Going) and dep in partition.going:
                raise SimulationError(f"{partition.name} uses {dep.name}, which may still be under way")
            values.append(dep.result if isinstance(dep, Going) else dep)
        return values[0] if len(values) == 1 else tuple(values)

    # gl

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        name = self.buffers.pop(0)
        places: list[Any]
        if dtype is torch.int64:
            places = [Barrier(f"{name}[{i}]") for i in range(shape[0])]
        else:
            places = [Place(f"{name}[{i}]", torch.full(shape[1:], float("nan"), dtype=dtype)) for i in range(shape[0])]
        return Shared(places, dtype, shape)

    def scope(self) -> dict[str, Any]:
        """What the kernel's module finds under the names it imports."""
        layouts = ("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout")
        gl = SimpleNamespace(
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            load=load,
            store=store,
            arange=lambda a, b, layout=None: torch.arange(a, b),
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
            where=_where,
            maximum=lambda a, b: torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b),
            minimum=lambda a, b: torch.minimum(a, b) if isinstance(a, Tensor) else min(a, b),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2,
            inline_asm_elementwise=_assembly,
            log2=torch.log2,
            cast=lambda x, dtype: x.to(dtype) if isinstance(x, Tensor) else x,
            convert_layout=lambda x, layout: x,
            static_range=range,
            float32=torch.float32,
            int64=torch.int64,
            constexpr=lambda x: x,
            **{name: lambda *a, **k: SimpleNamespace(**k) for name in layouts},
        )
        mbarrier = SimpleNamespace(
            init=self.init, expect=self.expect, arrive=self.arrive, wait=self.wait, MBarrierLayout=lambda: None
        )
        return {
            "gl": gl,
            "mbarrier": mbarrier,
            "_tma_load": self.load_block,
            "warpgroup_mma": self.mma,
            "warpgroup_mma_wait": self.mma_wait,
            "fence_async_shared": lambda: None,
        }


def _assembly(text: str, constraints: str, values: Sequence[Tensor], **options: Any) -> Tensor:
    """What the one instruction that the kernels write themselves computes."""
    assert text == "rcp.approx.ftz.f32 $0, $1;" and options["dtype"] is torch.float32, text
    return values[0].reciprocal()


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    like = a if isinstance(a, Tensor) else b
    return torch.where(condition, *(torch.as_tensor(x, dtype=like.dtype) for x in (a, b)))


class Simulated:
    """Stands in place of a kernel: `Simulated(module, name, seed)[grid](...)`.

    edits: per function of the module a text to replace and its replacement, to break the kernel on purpose.
    """

    def __init__(self, module: ModuleType, kernel: str, seed: int = 0, edits: Edits | None = None) -> None:
        self.seed, self.kernel, self.edits = seed, kernel, dict(edits or {})
        self.functions = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
        self.constants = {
            name: value.value if isinstance(value, real_gl.constexpr) else value
            for name, value in vars(module).items()
            if not isinstance(value, JITFunction)
        }
        self.code = [self._code(name) for name in self.functions]
        source = inspect.getsource(self.functions[kernel].fn)
        self.buffers = re.findall(r"(\w+) = gl\.allocate_shared_memory", source)
        self.stored: list[Tensor] = []

    def _code(self, name: str) -> Any:
        source = textwrap.dedent(inspect.getsource(self.functions[name].fn))
        source = source[source.index("def ") :]
        if name in self.edits:
            old, new = self.edits[name]
            assert source.count(old) == 1, f"{name} has {source.count(old)} times {old!r}"
            source = source.replace(old, new)
        file = f"<simulated {name}{' edited' if name in self.edits else ''}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        return compile(source, file, "exec", flags=__future__.annotations.compiler_flag)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, **constants: Any) -> None:
            given = list(_wrapped(arguments, self.stored))
            for program in range(grid[0]):
                machine = Machine(program, grid[0], self.seed, list(self.buffers))
                scope = self.constants | machine.scope()
                for code in self.code:
                    exec(code, scope)
                scope[self.kernel](*given, **constants)

        return run


def _wrapped(arguments: Sequence[Any], stored: list[Tensor]) -> Iterator[Any]:
    """Kernel arguments as the simulated kernel sees them; `stored` gets a count of stores per element of every tensor."""
    for argument in arguments:
        if isinstance(argument, TensorDescriptor):
            yield Blocks(argument)
        elif isinstance(argument, Tensor):
            assert argument.is_contiguous()
            stored.append(torch.zeros(argument.numel(), dtype=torch.int32))
            yield Pointer(argument.view(-1), stored[-1])
        else:
            yield argument
