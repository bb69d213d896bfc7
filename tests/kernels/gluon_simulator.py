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
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

Clock = dict[str, int]
Edits = Mapping[str, tuple[str, str]]


class SimulationError(Exception):
    """The kernel did what no schedule may do."""


class DeadlockError(SimulationError):
    """Nobody can go on."""


class RaceError(SimulationError):
    """Two accesses to one place in shared memory that nothing orders."""


class _Abandoned(BaseException):
    """Unwinds the threads that are left after an error."""


def _join(into: Clock, other: Clock) -> None:
    for actor, time in other.items():
        if into.get(actor, 0) < time:
            into[actor] = time


@dataclass
class Barrier:
    """An mbarrier. `done` phases are over; `clock` is what waiting for the last of them tells."""

    name: str
    count: int = 0
    arrivals: int = 0
    bytes_missing: int = 0
    done: int = 0
    clock: Clock = field(default_factory=dict)
    gathering: Clock = field(default_factory=dict)

    def passes(self, parity: int) -> bool:
        return self.done & 1 != parity

    def arrive(self, count: int, clock: Clock) -> None:
        if self.count == 0:
            raise SimulationError(f"arrival at {self.name}, which was never initialised")
        self.arrivals += count
        if self.arrivals > self.count:
            raise SimulationError(f"{self.name}: {self.arrivals} arrivals in phase {self.done}, it takes {self.count}")
        _join(self.gathering, clock)
        self.settle()

    def land(self, size: int, clock: Clock) -> None:
        self.bytes_missing -= size
        if self.bytes_missing < 0:
            raise SimulationError(f"{self.name}: {-self.bytes_missing} more bytes landed than were expected")
        _join(self.gathering, clock)
        self.settle()

    def settle(self) -> None:
        if self.arrivals == self.count and self.bytes_missing == 0:
            self.done += 1
            self.arrivals = 0
            _join(self.clock, self.gathering)
            self.gathering = {}

    def __str__(self) -> str:
        missing = f", {self.bytes_missing} bytes missing" if self.bytes_missing else ""
        return f"{self.name} ({self.done} phases over, {self.arrivals} of {self.count} arrivals{missing})"


@dataclass
class Place:
    """One slot of a shared buffer: its data, who wrote it last and who has read it since."""

    name: str
    data: Tensor
    writer: tuple[str, int] | None = None
    readers: list[tuple[str, int]] = field(default_factory=list)

    def read_by(self, actor: str, clock: Clock) -> None:
        if self.writer is None:
            raise RaceError(f"{actor} reads {self.name}, which was never written")
        if clock.get(self.writer[0], 0) < self.writer[1]:
            raise RaceError(f"{actor} reads {self.name} without knowing that {self.writer[0]} has ended")
        self.readers.append((actor, clock[actor]))

    def written_by(self, actor: str, clock: Clock) -> None:
        for other, time in [*self.readers, *([self.writer] if self.writer else [])]:
            if clock.get(other, 0) < time:
                raise RaceError(f"{actor} overwrites {self.name} without knowing that {other} has ended")
        self.writer, self.readers = (actor, clock[actor]), []
        self.data.fill_(float("nan"))


class Shared:
    """A buffer in shared memory, or one place of it, as it is or transposed."""

    def __init__(self, places: list[Any], dtype: Any, shape: Sequence[int], turned: bool = False) -> None:
        self.places, self.dtype, self.shape, self.turned = places, dtype, list(shape), turned

    def index(self, i: int) -> Shared:
        if not 0 <= i < len(self.places):
            raise SimulationError(f"index {i} of a buffer of {len(self.places)} places")
        return Shared([self.places[i]], self.dtype, self.shape[1:])

    def permute(self, order: Sequence[int]) -> Shared:
        assert tuple(order) == (1, 0) and len(self.places) == 1
        return Shared(self.places, self.dtype, self.shape[::-1], not self.turned)

    def value(self) -> Tensor:
        data = self.places[0].data
        return (data.t() if self.turned else data).float()


class Pointer:
    """Address in a flat tensor: one, or a tensor of them."""

    def __init__(self, memory: Tensor, stored: Tensor, at: Any = 0) -> None:
        self.memory, self.stored, self.at = memory, stored, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.stored, self.at + offset)

    def chosen(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Flat addresses and mask, of one shape; addresses outside the tensor are an error."""
        at = torch.as_tensor(self.at)
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask
        at, mask = torch.broadcast_tensors(at, mask)
        wrong = mask & ((at < 0) | (at >= self.memory.numel()))
        if wrong.any():
            raise SimulationError(f"global access at {int(at[wrong][0])} of {self.memory.numel()} elements")
        return at.masked_fill(~mask, 0), mask


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
        _join(partition.clock, barrier.places[0].clock)

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
            _join(partition.clock, ended.clock)
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
            load=_load,
            store=_store,
            arange=lambda a, b, layout=None: torch.arange(a, b),
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
            where=_where,
            maximum=lambda a, b: torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b),
            minimum=lambda a, b: torch.minimum(a, b) if isinstance(a, Tensor) else min(a, b),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2,
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
            "tma": SimpleNamespace(async_copy_global_to_shared=self.load_block),
            "warpgroup_mma": self.mma,
            "warpgroup_mma_wait": self.mma_wait,
            "fence_async_shared": lambda: None,
        }


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    at, mask = pointer.chosen(mask)
    found = torch.where(mask, pointer.memory[at], torch.as_tensor(other, dtype=pointer.memory.dtype))
    return found if found.dim() else found.item()


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    at, mask = pointer.chosen(mask)
    value = torch.broadcast_to(value, at.shape)[mask]
    pointer.memory[at[mask]] = value.to(pointer.memory.dtype)
    pointer.stored[at[mask]] += 1
    if (pointer.stored[at[mask]] > 1).any():
        raise SimulationError("an element of global memory is stored twice")


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    like = a if isinstance(a, Tensor) else b
    return torch.where(condition, *(torch.as_tensor(x, dtype=like.dtype) for x in (a, b)))


class _Blocks:
    """A host-made TMA descriptor."""

    def __init__(self, desc: TensorDescriptor) -> None:
        self.base = torch.as_strided(desc.base, list(desc.shape), list(desc.strides))
        self.dtype, self.layout = desc.base.dtype, desc.layout
        rows, columns = desc.block_shape
        self.block_type = SimpleNamespace(shape=[rows, columns], nbytes=rows * columns * desc.base.element_size())

    def block(self, row: int, column: int) -> Tensor:
        out = torch.zeros(self.block_type.shape, dtype=self.dtype)
        part = self.base[max(row, 0) : row + out.shape[0], column : column + out.shape[1]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


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
            yield _Blocks(argument)
        elif isinstance(argument, Tensor):
            assert argument.is_contiguous()
            stored.append(torch.zeros(argument.numel(), dtype=torch.int32))
            yield Pointer(argument.view(-1), stored[-1])
        else:
            yield argument
