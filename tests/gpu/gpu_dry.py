"""A rehearsal of a visit without a GPU: the real plan and scripts around fake processes and a fake clock.

    make gpu ARGS="--parts first --dry --out /tmp/rehearsal"

Every command line is built as in a visit and read: benchmark cases and contenders must exist, recipes must load with their
overrides, smoke operations must be known. Then it "takes" some seconds of the fake clock and leaves made-up figures where the
real one would. gpu.json, summary.txt and the tables of a rehearsal are marked as such.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_smoke
import gpu_training
import gpu_visit
from gpu_check import TIMED, Check

MACHINE = {
    "date": "rehearsal",
    "gpu": "no GPU: made-up figures",
    "capability": "9.0",
    "versions": {},
}
SECONDS = {"hopper_check": 12, "harness": 20, "gpu_training": 40, "gpu_smoke": 7, "pytest": 20, "data": 20}


def rehearse(name: str, out: Path, hangs: Sequence[str] = ()) -> int:
    """The plan of a command; hangs: words of commands that never end."""
    check = DryCheck(out, gpu_visit.BUDGET_S[name], hangs)
    check.report.content["machine"] = MACHINE
    return gpu_visit.run(name, check)


class DryProcess:
    """Ends some seconds after it began, and then leaves its results."""

    pid = 0

    def __init__(self, check: DryCheck, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._check, self._command, self._environment = check, list(command), environment
        self._code: int | None = None
        line = " ".join(command)
        kind = "data" if "--only-data" in command else next(kind for kind in SECONDS if kind in line)
        hangs = any(words in line for words in check.hangs)
        self._ends = float("inf") if hangs else check.now() + SECONDS[kind]
        self._result = results_of(kind, self._command, check)
        if hangs and kind == "hopper_check":
            self.write("--verdict", {"one_tile": "its check did not end", "backward": "its check did not end"})

    def poll(self) -> int | None:
        if self._code is None and self._check.now() >= self._ends:
            self._code = 0
            for option, content in self._result.items():
                self.write(option, content)
        return self._code

    def write(self, option: str, content: Any) -> None:
        if option == "CHATMILL_TEST_LOG":
            with Path(self._environment[option]).open("a", encoding="utf-8") as log:
                log.write(json.dumps(content) + "\n")
            return
        path = Path(value_of(self._command, option))
        if option == "--out" and "--op" in self._command:
            path = gpu_smoke.file_of(path, value_of(self._command, "--op"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


class DryCheck(Check):
    """A check whose clock is a number and whose processes are not started."""

    is_dry = True

    def __init__(self, out: Path, budget_s: float, hangs: Sequence[str] = ()) -> None:
        self.clock, self.hangs = 0.0, hangs
        self.commands: list[list[str]] = []
        super().__init__(out, budget_s, jobs=2)

    def now(self) -> float:
        return self.clock

    def pause(self, seconds: float) -> None:
        self.clock += seconds

    def start(self, command: Sequence[str], **environment: str) -> Any:
        self.commands.append(list(command))
        return DryProcess(self, command, self.environment | environment)

    def end(self, process: Any) -> None:
        self.clock += self.grace_s


def value_of(command: Sequence[str], option: str) -> str:
    return command[list(command).index(option) + 1]


def values_of(command: Sequence[str], option: str) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command) if word == option]


def results_of(kind: str, command: Sequence[str], check: DryCheck) -> dict[str, Any]:
    """What the process would leave, by the option that names the file; raises where the command cannot be right."""
    if kind == "data":
        return {}
    if kind == "hopper_check":
        from chatmill.kernels.bench.hopper_check import CHECKS

        names = [word for word in command if word in CHECKS]
        return {"--verdict": dict.fromkeys(names)}
    if kind == "pytest":
        name = TIMED if value_of(command, "-k") == TIMED else "other"
        return {"CHATMILL_TEST_LOG": {"test": f"tests/rehearsal.py::test_{name}_{len(check.commands)}", "outcome": "passed"}}
    if kind == "gpu_smoke":
        if value_of(command, "--op") not in gpu_smoke.OPS:
            raise ValueError(f"no smoke operation {value_of(command, '--op')}")
        return {"--out": {"ok": True, "errors": {"out": 1e-3}, "limit": gpu_smoke.LIMIT, "seconds": 7}}
    if kind == "gpu_training":
        return {"--out": training(command)}
    return {"--json": benchmark(command)}


def training(command: Sequence[str]) -> dict[str, Any]:
    from chatmill.trainer.config import load_recipe

    overrides = [word for word in command if "=" in word]
    recipe = load_recipe(value_of(command, "--recipe"), ["data.path=x", *gpu_training.OVERRIDES, *overrides])
    median = {"tokens_per_s": 1.0, "mfu": 0.01, "required_mfu": 0.01, "data_wait_share": 0.0}
    return {
        "recipe": value_of(command, "--recipe"),
        "median": median,
        "memory_peak_bytes": 1 << 30,
        "first_steps_s": [1.0, 1.0],
        "attention": recipe.kernels.attention,
    }


def benchmark(command: Sequence[str]) -> dict[str, Any]:
    """Rows of the cases and contenders that the words choose; every word must choose something."""
    from chatmill.kernels.bench.harness import REGISTRY

    kernels = [word for word in command if word in REGISTRY]
    matches, only = values_of(command, "--match"), values_of(command, "--only")
    modules = dict.fromkeys(REGISTRY[kernel][0] for kernel in kernels)
    cases = [case for m in modules for case in importlib.import_module(m).bench_cases() if case.kernel in kernels]
    rows, seen = [], set()
    for case in cases:
        if not any(words in case.name for words in matches):
            continue
        seen |= {words for words in matches if words in case.name} | ({*only} & {*case.contenders})
        for phase in ("forward", "both"):
            for i, name in enumerate(name for name in case.contenders if name in only):
                rows.append(
                    {"kernel": case.kernel, "case": case.name, "contender": name, "phase": phase, "ms": 1.0 + i, "reason": None}
                )
    if missing := {*matches, *only} - seen - {gpu_visit.NO_CASE}:
        raise ValueError(f"no benchmark of {', '.join(kernels)} has {', '.join(sorted(missing))}")
    return {"machine": {"gemm_tflops": 1.0, "copy_gbytes_per_s": 1.0}, "results": rows}
