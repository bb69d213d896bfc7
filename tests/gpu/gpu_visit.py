"""The plan of a visit of fifteen minutes to a GPU: two commands, each step a process of its own with a limit.

    make gpu ARGS="--parts first"       560 s: the figures, the most important first, then tests until the end
    make gpu ARGS="--parts second"      150 s: the rest of the tests, decoding, memcheck
    make gpu ARGS="--parts first --dry" the whole plan without a GPU: fake processes and a fake clock, made-up figures

A step that hangs is killed at its limit, and the limits of the figures, added up, leave time for the tests. The Hopper check
runs once; its verdict is a file that all later processes read, and Hopper steps are left out where it says so. Every result is
in gpu.json as soon as it is there; the tables that the figures justify are written after every step (gpu_table.py).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gpu_smoke
import gpu_table
from gpu_check import BILLION, EIGHT, ROOT, Check

VERDICT = "CHATMILL_HOPPER_VERDICT"
BUDGET_S = {"first": 560.0, "second": 150.0}
GRACE_S = 2.0  # of a process that is killed; no step runs torchrun
SMOKE_AT_ONCE = 4  # the fp64 truths of so many fit into the memory together
TRAININGS = {
    "1b": [*BILLION, "logging.profile_steps=[14,15]"],
    "1b hopper": [*BILLION, "kernels.attention=hopper"],
    "1b compiled": [*BILLION, "train.compile=true"],
    "8b checkpointing of 26 of 32 layers": [
        *EIGHT,
        "train.micro_batch=5",
        "train.activation_checkpointing=full",
        "train.activation_checkpointing_layers=26",
    ],
}
NO_CASE = "no case: only the machine's rates"
OURS = ["triton", "hopper", "hopper fused"]
# part -> kernels, cases, contenders
BENCHES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "ceilings": (["rms_norm"], [NO_CASE], []),
    "attention": (
        ["attention"],
        ["D64 S4096 H32/32", "D128 S4096 H16/16", "D64 S8192 H32/32", "D128 S8192 H16/16", "packed D128 T8192 mean500"],
        [*OURS, "flash2", "flash3", "flash4", "sdpa", "sdpa-cudnn", "sdpa-flash"],
    ),
    "loss": (
        ["linear_cross_entropy"],
        ["N16384 H2048 V128256 loss 100%", "N16384 H2048 V128256 loss 20%", "N16384 H4096 V128256"],
        ["triton", "triton by torch"],
    ),
    "layer": (["rms_norm", "swiglu", "rope"], ["T8192 H4096", "T8192 F14336", "D128"], ["triton"]),
    "decode": (["decode_attention"], [""], ["triton", "sdpa"]),
}


@dataclass(frozen=True)
class Step:
    """One line of the plan. limit_s: it is killed then. needs: why it is left out, "" where it is not."""

    name: str
    limit_s: float
    run: Callable[[Visit, float], bool]
    needs: Callable[[Visit], str] = field(default=lambda visit: "")


class Visit:
    """What the steps share: the check (where results go, how processes run) and the verdict on the Hopper tier."""

    def __init__(self, check: Check) -> None:
        self.check = check
        check.grace_s = GRACE_S
        self.verdict = check.out / "hopper.json"
        check.environment[VERDICT] = str(self.verdict)

    def hopper_problem(self) -> str:
        """Why Hopper steps are left out; "" where the tier was found right."""
        try:
            told = json.loads(self.verdict.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "the Hopper check wrote no verdict"
        return next((str(told.get(name, "not checked")) for name in ("one_tile", "backward") if told.get(name, "?")), "")

    def go(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Run the steps in order; outcome per step. An error in one costs only this one."""
        outcome: dict[str, Any] = {}
        for step in steps:
            left = self.check.left_s()
            print(f"== {step.name} ({left:.0f} s left)", flush=True)
            if left < 10.0:
                outcome[step.name] = "no time was left"
            elif reason := step.needs(self):
                outcome[step.name] = f"left out: {' '.join(reason.split())[:200]}"
            else:
                try:
                    outcome[step.name] = "ok" if step.run(self, min(step.limit_s, left)) else "failed"
                except Exception as error:
                    outcome[step.name] = f"{type(error).__name__}: {error}"
            self.check.report.content["visit"] = outcome
            try:  # after every step: a visit that is cut short has its tables
                self.check.report.content["tables"] = gpu_table.write_tables(self.check.report.content, self.check.out)
            except Exception as error:
                self.check.report.content["tables"] = f"{type(error).__name__}: {error}"
            self.check.report.write()
            print(f"  {outcome[step.name]}", flush=True)
        return outcome


def ceilings(visit: Visit, limit_s: float) -> bool:
    """Imports, then matrix products and copies: what everything is measured against."""
    visit.check.make_data()  # on the CPU, beside the steps before the first training
    return bench("ceilings")(visit, limit_s)


def hopper_check(visit: Visit, limit_s: float) -> bool:
    """Whether the Hopper tier is right and ends. All other processes read the verdict and ask no more."""
    command = [sys.executable, "-m", "chatmill.kernels.bench.hopper_check", "one_tile", "backward"]
    command += ["--timeout-s", f"{limit_s / 2 - 1:.1f}", "--verdict", str(visit.verdict)]
    return visit.check.run("hopper", "check", command, limit_s, visit.verdict)


def smoke(visit: Visit, limit_s: float) -> bool:
    """Each operation once at real size, some at a time; one that hangs is killed with its step, and named."""
    check, folder = visit.check, visit.check.scratch / "smoke"
    waiting = [op for op in gpu_smoke.OPS if "hopper" not in op or not visit.hopper_problem()]
    running: dict[str, Any] = {}
    end = check.now() + limit_s
    found: dict[str, Any] = {op: {"ok": False, "problem": "it was not begun"} for op in waiting}
    # what the tables of other parts depend on first: losses and attention; the order of OPS is that
    while (waiting or running) and check.now() < end:
        while waiting and len(running) < SMOKE_AT_ONCE:
            op = waiting.pop(0)
            found[op] = {"ok": False, "problem": "it did not end"}
            command = [sys.executable, str(ROOT / "tests" / "gpu" / "gpu_smoke.py"), "--op", op, "--out", str(folder)]
            running[op] = check.start(command)
        check.pause(0.25)
        for op in [op for op, process in running.items() if process.poll() is not None]:
            code, result = running.pop(op).poll(), gpu_smoke.file_of(folder, op)
            found[op] = json.loads(result.read_text()) if result.exists() else {"ok": False, "problem": f"exit code {code}"}
            check.report.put("smoke", **found)
    for process in running.values():
        check.end(process)
    for run in found.values():
        run["outcome"] = "ok" if run["ok"] else f"WRONG {run.get('problem') or run.get('errors')}"
    check.report.put("smoke", **found)
    for op, run in found.items():
        if not run["ok"]:
            print(f"  WRONG {op}: {run.get('problem') or run.get('errors')}", flush=True)
    return all(run["ok"] for run in found.values())


def training(name: str) -> Callable[[Visit, float], bool]:
    def run(visit: Visit, limit_s: float) -> bool:
        check, data = visit.check, visit.check.make_data()
        if not check.data_is_made(min(limit_s, 30.0)):
            check.report.put("train", data={"outcome": "the training data could not be made: see log.txt"})
            return False
        result = check.scratch / f"{name.replace(' ', '-')}.json"
        command = [sys.executable, str(ROOT / "tests" / "gpu_training.py"), "--data", str(data), "--out", str(result)]
        command += ["--profile", str(check.scratch / "profile"), *TRAININGS[name]]
        good = check.run("train", name, command, limit_s, result)
        check.keep_profile()
        return good

    return run


def bench(part: str) -> Callable[[Visit, float], bool]:
    def run(visit: Visit, limit_s: float) -> bool:
        kernels, matches, only = BENCHES[part]
        result = visit.check.scratch / f"{part}.json"
        words = [w for match in matches for w in ("--match", match)] + [w for name in only for w in ("--only", name)]
        command = [sys.executable, "-m", "chatmill.kernels.bench.harness", *kernels, *words, "--json", str(result)]
        return visit.check.run(part, "bench", [*command, "--budget-s", f"{limit_s - 8:.0f}"], limit_s, result)

    return run


def suite(visit: Visit, limit_s: float) -> bool:
    """Tests in shards, those that need a GPU first; tests.jsonl remembers what was run."""
    return visit.check.tests(limit_s)


def timed(visit: Visit, limit_s: float) -> bool:
    return visit.check.tests(limit_s, timed=True)


def memcheck(visit: Visit, limit_s: float) -> bool:
    """compute-sanitizer over small smoke operations: reads and writes outside of tensors."""
    script = [
        sys.executable,
        str(ROOT / "tests" / "gpu" / "gpu_smoke.py"),
        "--small",
        "--out",
        str(visit.check.scratch / "memcheck"),
    ]
    tool, good = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"], True
    for op in ("loss products triton bf16", "attention triton D64 packed"):
        good &= visit.check.run("memcheck", op, [*tool, *script, "--op", op], limit_s / 2, visit.check.scratch / "none.json")
    return good


def why_no_memcheck(visit: Visit) -> str:
    return "" if visit.check.is_dry or shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"


PLAN: dict[str, tuple[Step, ...]] = {
    "first": (
        Step("ceilings", 30, ceilings),
        Step("hopper", 30, hopper_check),
        Step("smoke", 60, smoke),
        Step("1b", 60, training("1b")),
        Step("attention", 65, bench("attention")),
        Step("loss", 45, bench("loss")),
        Step("layer", 25, bench("layer")),
        Step("1b hopper", 55, training("1b hopper"), Visit.hopper_problem),
        Step("1b compiled", 70, training("1b compiled")),
        Step("8b", 75, training("8b checkpointing of 26 of 32 layers")),
        Step("suite", BUDGET_S["first"], suite),
    ),
    "second": (
        Step("suite", 75, suite),
        Step("timed", 25, timed),
        Step("decode", 25, bench("decode")),
        Step("memcheck", 20, memcheck, why_no_memcheck),
    ),
}


def run(name: str, check: Check) -> int:
    """All steps of a command; 1 if one failed."""
    outcome = Visit(check).go(PLAN[name])
    shutil.rmtree(check.scratch, ignore_errors=True)
    print((check.out / "summary.txt").read_text(encoding="utf-8"))
    print(json.dumps(outcome, indent=1))
    return int(any(said != "ok" and not said.startswith("left out") for said in outcome.values()))
