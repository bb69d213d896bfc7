"""A launch is repeated without Triton's own work only where Triton could not take another build."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import chatmill

PROGRAM = """
import json, random, sys
import torch, triton, triton.language as tl
from triton import knobs
from chatmill.kernels import launch as launching
from chatmill.kernels.gates.fake_gpu import fake_gpu
from chatmill.kernels.launch import call_key, launch, launched_by_triton

@triton.jit
def add_kernel(X, Y, n, stride, scale, SIZE: tl.constexpr, TWICE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(X + at * stride, mask=at < n, other=0.0)
    tl.store(Y + at, x * scale * (2.0 if TWICE else 1.0), mask=at < n)

base = torch.zeros(64)
tensors = [base, base[4:], base[8:], base[5:], base[1:], base[2:], base.half(), base.half()[8:], base.double()]
tensors.append(torch.nn.Parameter(base.half()))
numbers = [0, 1, 2, 15, 16, 17, 32, -16, 2**31 - 1, 2**31, 2**63, True, False, None, 1.0, 16.0]
draw = random.Random(0)
found, told = {}, {}

def report(name, value):
    told[name] = value

with fake_gpu(90, quick=True) as gpu:
    add_kernel[(1,)](base, base, 1, 1, 1.0, SIZE=16, TWICE=False)
    binder = add_kernel.device_caches[triton.runtime.driver.active.get_current_device()][4]
    repeated = stale = 0
    for _ in range(4000):
        args = [base, base, 5, 16, 2.0]
        for place in draw.sample(range(5), 2):  # two at a time, so that many calls count as the same
            args[place] = draw.choice(tensors if place < 2 else numbers)
        constants = {"SIZE": draw.choice([16, 1, True]), "TWICE": draw.choice([False, 0]), "num_warps": 4}
        key = call_key(args, constants)
        _, specialization, options = binder(*args, **constants)
        wanted = repr((specialization, options))
        repeated += key in found
        stale += found.get(key, wanted) != wanted
        found[key] = wanted
    report("stale", stale)
    report("repeated", repeated)
    report("keys", len(found))
    report("classes", len(set(found.values())))

    def counted(*args, times=3, **constants):
        '''Launches, and how often Triton's own path was taken.'''
        gpu.launches.clear()
        taken, run = [], triton.runtime.jit.JITFunction.run
        def seen(self, *a, **k):
            taken.append(1)
            return run(self, *a, **k)
        triton.runtime.jit.JITFunction.run = seen
        try:
            for _ in range(times):
                launch(add_kernel, (3, 2), *args, **constants)
        finally:
            triton.runtime.jit.JITFunction.run = run
        return [len(gpu.launches), len(taken), sorted({launch.grid for launch in gpu.launches})]

    options = {"SIZE": 16, "TWICE": True, "num_warps": 1}
    report("first", counted(base, base, 5, 16, 2.0, **options))
    report("again", counted(base, base, 5, 16, 2.0, **options))
    report("between 16 bytes", counted(base[1:], base, 5, 16, 2.0, times=1, **options))
    report("the value 1", counted(base, base, 5, 1, 2.0, times=1, **options))
    report("another dtype", counted(base.half(), base, 5, 16, 2.0, times=1, **options))
    report("True, not 1", counted(base, base, 5, 16, 2.0, times=1, **options | {"TWICE": 1}))
    with launched_by_triton():
        report("by triton", counted(base, base, 5, 16, 2.0, **options))
    knobs.runtime.launch_enter_hook.add(print_nothing := (lambda metadata: None))
    report("watched", counted(base, base, 5, 16, 2.0, **options))
    knobs.runtime.launch_enter_hook.remove(print_nothing)
    try:
        launch(add_kernel, (70_000, 70_000), base, base, 5, 16, 2.0, **options)
    except Exception as refused:
        report("refused", type(refused).__name__)
    # a stale build: what the key of another call holds must be seen to be wrong, so a key that forgets alignment is caught
    launching.call_key = lambda arguments, constants: "the same for all"
    launching._builds.clear()
    launch(add_kernel, (1,), base, base, 5, 16, 2.0, **options)
    gpu.launches.clear()
    forgetful = counted(base.half(), base, 5, 16, 2.0, times=1, **options)
    report("a key that forgets", forgetful[1])
with fake_gpu(80, quick=True) as other:
    launching.call_key = call_key
    launch(add_kernel, (1,), base, base, 5, 16, 2.0, SIZE=16, TWICE=True, num_warps=1)
    report("another driver", len(other.launches))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process without the interpreter found on a stand-in for a GPU."""
    file = tmp_path_factory.mktemp("launch") / "program.py"
    file.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(chatmill.__file__).parents[1])
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_calls_that_count_as_the_same_are_the_same_to_triton(told: dict[str, Any]) -> None:
    """4,000 drawn calls: dtypes, addresses, 1, 16, 32 and 64 bits, booleans, constants. Triton's own description judges."""
    assert told["stale"] == 0
    assert told["repeated"] > 1_000 and told["keys"] > told["classes"] > 100


def test_a_repeated_launch_goes_past_triton_and_starts_the_same_grid(told: dict[str, Any]) -> None:
    assert told["first"] == [3, 1, [[3, 2, 1]]]
    assert told["again"] == [3, 0, [[3, 2, 1]]]
    assert told["refused"] == "LaunchError", "what the driver refuses is refused here too"


@pytest.mark.parametrize("change", ["between 16 bytes", "the value 1", "another dtype", "True, not 1"])
def test_what_would_take_another_build_goes_through_triton(told: dict[str, Any], change: str) -> None:
    assert told[change][:2] == [1, 1]
    assert told["a key that forgets"] == 0, "with a key that leaves it out, the wrong build is started: this test would see it"


def test_profilers_see_every_launch_and_another_gpu_gets_its_own_build(told: dict[str, Any]) -> None:
    assert told["watched"][:2] == told["by triton"][:2] == [3, 3]
    assert told["another driver"] == 1
