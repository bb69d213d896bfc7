"""Parity: the same seed and data give the same losses and gradients, however a step is divided and computed.

    chatmill doctor --parity [--full] [--engines ddp,fsdp2] [--world-sizes 1,2]

Axes: engine x world size x accumulation x packed or padded dialogues x activation checkpointing x kernels. Every case trains
the same small model on the same dialogues for a few steps and is compared with the reference: one process, no accumulation,
packed, all activations kept, every operation by its slow reference. It is judged by, relative to the reference,
    loss       the largest difference of any step
    gradient   the largest difference of any parameter (L2 norms), of full tensors gathered before the first update
Beside these axes, every engine at world sizes 1 and 2 trains a LoRA adapter, and those that can do so on a base of 4 bits; ddp
and fsdp2 divide each batch among 2 and 4 processes (parallel.context), by exchanged heads and around a ring.
By default a covering set runs: every pair of values of any two axes occurs in some case, so every engine at every world size
does too. --full runs the product. The processes of one (engine, world size) are forked once and run all its cases.
On a machine with enough GPUs a group runs there (NCCL, compiled kernels), else on the CPU (gloo, interpreted kernels).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, cast

from chatmill.config import ConfigError
from chatmill.files import replace_text

from .parity_case import GRADIENT_TOLERANCE, INTERPRETED_STEPS, LOSS_TOLERANCE, REFERENCE, REFERENCES, STEPS, Case

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
WORLD_SIZES = (1, 2, 4)
ACCUMULATIONS = (1, 2, 4)


@dataclass(frozen=True)
class CaseResult:
    """A case and how far it is from the reference (relative). problem: why there are no figures, or which one is too far."""

    case: Case
    loss: float | None
    gradient: float | None
    problem: str = ""


def all_cases(engines: Sequence[str], world_sizes: Sequence[int], kernels: Sequence[str]) -> list[Case]:
    """The whole product; `single` at world size 1 only."""
    product = itertools.product(engines, world_sizes, ACCUMULATIONS, ("packed", "padded"), (False, True), kernels)
    return [Case(*cast(Any, values)) for values in product if values[0] != "single" or values[1] == 1]


def adapter_cases(engines: Sequence[str], world_sizes: Sequence[int], kernels: Sequence[str]) -> list[Case]:
    """An adapter on every engine, with accumulation and recomputation; on a base of 4 bits where bitsandbytes is installed."""
    chosen = next((name for name in ("auto", "torch", "reference") if name in kernels), "reference")
    found = []
    for engine, size in itertools.product(engines, [size for size in world_sizes if size <= 2]):
        if (engine == "single") != (size == 1):
            continue
        common: dict[str, Any] = {"accumulation": 2, "checkpointing": True, "kernels": chosen}
        found.append(Case(engine, size, **common, weights="lora"))
        if not engine.startswith("zero") and importlib.util.find_spec("bitsandbytes") is not None:
            found.append(Case(engine, size, **common, weights="nf4"))
    return found


def context_cases(engines: Sequence[str], world_sizes: Sequence[int], kernels: Sequence[str]) -> list[Case]:
    """Processes that divide each batch: 2 and 4 of them, 2 beside 2 other batches, with recomputation and with an adapter."""
    chosen = next((name for name in ("auto", "torch") if name in kernels), "")
    if not chosen:  # the reference attention gives no log-sum-exp
        return []
    accumulated: dict[str, Any] = {"accumulation": 2, "kernels": chosen}
    recomputed: dict[str, Any] = {"checkpointing": True, "kernels": chosen}
    cases = [
        Case("ddp", 2, **accumulated, context=2, method="ulysses"),
        Case("ddp", 2, **recomputed, context=2, method="ring"),
        Case("fsdp2", 2, **recomputed, context=2, method="ulysses", weights="lora"),
        Case("zero1", 2, **recomputed, context=2, method="ring"),
        Case("zero2", 2, **accumulated, context=2, method="ulysses"),
        Case("zero3", 2, **recomputed, context=2, method="ulysses", weights="lora"),
        Case("zero3", 4, **accumulated, context=2, method="ring"),
        Case("fsdp2", 4, **accumulated, context=2, method="ulysses"),
        Case("fsdp2", 4, **recomputed, context=4, method="ring"),
    ]
    if "triton" in kernels:
        cases.append(Case("ddp", 2, kernels="triton", context=2, method="ring"))
    return [case for case in cases if case.engine in engines and case.world_size in world_sizes]


def covering_set(cases: Sequence[Case]) -> list[Case]:
    """Few of the cases in which every pair of values that occurs in `cases` occurs; greedy, the same for the same list.

    Of cases that add equally much, one that is not interpreted is chosen, then the one with the fewest programs to interpret.
    """
    uncovered = set().union(*(_pairs(case) for case in cases))
    chosen: list[Case] = []
    while uncovered:
        best = max(cases, key=lambda case: (len(uncovered & _pairs(case)), -_interpreted(case)))
        uncovered -= _pairs(best)
        chosen.append(best)
    return chosen


def _interpreted(case: Case) -> int:
    """How much work a case gives Triton's interpreter: padded rows are more tiles, checkpointing runs layers twice."""
    return (case.kernels == "triton") * (1 + 2 * (case.layout == "padded") + case.checkpointing + (case.accumulation > 1))


def _pairs(case: Case) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(dataclasses.asdict(case).items(), 2))


def judge(case: Case, found: dict[str, Any], reference: dict[str, Any]) -> CaseResult:
    """Compare the losses of a case with the reference's; `found` holds `losses` and `gradient`, the largest difference."""
    loss = _largest([abs(a - b) / abs(b) for a, b in zip(found["losses"], reference["losses"], strict=False)])
    gradient = float(found["gradient"])
    problems = [
        f"{name} differs by {value:.1e}"
        for name, value, limit in (("loss", loss, LOSS_TOLERANCE), ("gradient", gradient, GRADIENT_TOLERANCE))
        if not value <= limit  # a NaN is not within it
    ]
    return CaseResult(case, loss, gradient, ", ".join(problems))


def _largest(values: Sequence[float]) -> float:
    """The largest value, or NaN where one is NaN: max() keeps or drops a NaN by its place."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def run_parity(cases: Iterable[Case], show: Callable[[CaseResult], None] = lambda row: None) -> list[CaseResult]:
    """Run the cases, grouped by engine and world size; `show` gets every row as soon as it is known."""
    import multiprocessing

    groups: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.engine, case.world_size), []).append(case)
    rows: list[CaseResult] = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chatmill.launcher.doctor.parity_rank", "deepspeed"])
    with tempfile.TemporaryDirectory(prefix="chatmill-parity-") as folder:
        kinds = list(dict.fromkeys(["full", *(case.weights for group in groups.values() for case in group)]))
        references = [REFERENCES[cast(Any, kind)] for kind in kinds]
        runs = [(REFERENCE.engine, REFERENCE.world_size, references), *((e, w, chosen) for (e, w), chosen in groups.items())]
        for number, (engine, world_size, chosen) in enumerate(runs):
            group = Path(folder) / f"{number:03d}"
            group.mkdir()
            words = [dataclasses.asdict(case) for case in chosen]
            (group / "cases.json").write_text(json.dumps(words), encoding="utf-8")
            reference = Path(folder) / "000"
            problem = missing(engine) or _run_group(context, group, reference, engine, world_size)
            if number == 0:
                if problem:
                    raise RuntimeError(f"the reference itself does not run:\n{problem}")
                expected = {k: json.loads((reference / f"{i}.json").read_text(encoding="utf-8")) for i, k in enumerate(kinds)}
                continue
            for i, case in enumerate(chosen):
                file = group / f"{i}.json"
                if file.is_file():
                    row = judge(case, json.loads(file.read_text(encoding="utf-8")), expected[case.weights])
                else:
                    row = CaseResult(case, None, None, problem or "no result")
                rows.append(row)
                show(row)
    return rows


def _run_group(context: Any, group: Path, reference: Path, engine: str, world_size: int) -> str:
    """Start the processes of one group and wait for them; returns the first error's text, or nothing."""
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, engine, str(group), str(reference))) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    while (waiting := [process for process in ranks if process.exitcode is None]) and not any(p.exitcode for p in ranks):
        connection.wait([process.sentinel for process in waiting])
    for process in waiting:  # they would wait for the dead one until they time out
        process.kill()
        process.join()
    errors = sorted(group.glob("error-*"))
    if errors:
        return errors[0].read_text(encoding="utf-8")
    codes = [process.exitcode for process in ranks]
    return f"processes ended with {codes}" if any(codes) else ""


def _rank(rank: int, world_size: int, engine: str, group: str, reference: str) -> None:
    """One process of a group. Only what a forked child needs is imported here."""
    log = os.open(os.path.join(group, f"log-{rank}"), os.O_CREAT | os.O_WRONLY)  # noqa: PTH118
    os.dup2(log, 1)  # DeepSpeed talks a lot
    os.dup2(log, 2)
    try:
        from .parity_rank import run_cases

        run_cases(rank, world_size, engine, Path(group), Path(reference))
    except BaseException:
        (Path(group) / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)
    os._exit(0)  # no waiting for threads of DeepSpeed's or gloo's


def missing(engine: str) -> str:
    """Why an engine cannot run here at all, or nothing."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "not run: DeepSpeed is not installed"
    return ""


def header() -> str:
    """Head of the printed table."""
    return (
        f"tolerance: losses {LOSS_TOLERANCE:g}, gradients {GRADIENT_TOLERANCE:g} (relative), {STEPS} steps in fp32 "
        f"({INTERPRETED_STEPS} interpreted)\n"
        f"{'engine':<8}{'world':>6}{'accum':>6}  {'layout':<8}{'ckpt':<6}{'kernels':<11}{'weights':<8}{'context':<11}"
        f"{'loss':>9}{'gradient':>10}"
    )


def line(row: CaseResult) -> str:
    """One row of the printed table."""
    case = row.case
    text = f"{case.engine:<8}{case.world_size:>6}{case.accumulation:>6}  {case.layout:<8}"
    text += f"{'on' if case.checkpointing else 'off':<6}{case.kernels:<11}{case.weights:<8}"
    text += f"{f'{case.context} {case.method}' if case.context > 1 else '-':<11}"
    if row.loss is not None and row.gradient is not None:
        text += f"{row.loss:>9.1e}{row.gradient:>10.1e}"
    return text + (f"  {row.problem.strip().splitlines()[-1]}" if row.problem else "  ok")


def is_failure(row: CaseResult) -> bool:
    """Whether a row counts against this machine; an engine that is not installed does not."""
    return bool(row.problem) and not missing(row.case.engine)


def usable_kernels() -> tuple[str, ...]:
    """The kernels axis here: compiled on a GPU; on a CPU the torch tier, and Triton's interpreter where triton is."""
    import torch

    if torch.cuda.is_available():
        return ("reference", "auto")
    return ("reference", "torch", *(("triton",) if importlib.util.find_spec("triton") is not None else ()))


def chosen_cases(options: argparse.Namespace) -> tuple[list[Case], int]:
    """The cases that the options ask for, and how many the whole product has. Raises ConfigError."""
    engines = options.engines.split(",") if options.engines else list(ENGINES)
    if unknown := sorted(set(engines) - set(ENGINES)):
        raise ConfigError(f"--engines: {', '.join(unknown)} unknown; choose from {', '.join(ENGINES)}")
    world_sizes = [int(size) for size in options.world_sizes.split(",")] if options.world_sizes else WORLD_SIZES
    kernels = options.kernels.split(",") if options.kernels else usable_kernels()
    product = all_cases(engines, world_sizes, kernels)
    if not product:
        raise ConfigError("no case left: `single` runs at world size 1 only")
    adapters = adapter_cases(engines, world_sizes, kernels)
    contexts = context_cases(engines, world_sizes, kernels)
    cases = [*(product if options.full else covering_set(product)), *adapters, *contexts]
    total = len(product) + len(adapters) + len(contexts)
    return sorted(cases, key=lambda case: (ENGINES.index(case.engine), case.world_size)), total


def parity(options: argparse.Namespace) -> int:
    """The command: run, print, write; returns 1 when a case is too far from the reference or fails."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported: in the processes that are forked later
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
    cases, product = chosen_cases(options)
    began = time.monotonic()
    if not options.json:
        print(header(), flush=True)
    rows = run_parity(cases, (lambda row: None) if options.json else lambda row: print(line(row), flush=True))
    seconds = time.monotonic() - began
    head = {"loss_tolerance": LOSS_TOLERANCE, "gradient_tolerance": GRADIENT_TOLERANCE, "steps": STEPS}
    found = head | {"seconds": round(seconds, 1), "rows": [dataclasses.asdict(row) for row in rows]}
    text = json.dumps(found, indent=1)
    if options.out:
        replace_text(Path(options.out), text + "\n")
    print(text if options.json else summary(rows, product, seconds))
    return int(any(is_failure(row) for row in rows))


def summary(rows: Sequence[CaseResult], product: int, seconds: float) -> str:
    """What is printed below the table: errors in full, then the largest differences."""
    failures = [row for row in rows if is_failure(row)]
    text = "".join(f"\n{line(row)}\n{row.problem}\n" for row in failures if row.loss is None)
    idle = sum(row.loss is None for row in rows if row not in failures)
    loss = _largest([row.loss for row in rows if row.loss is not None] or [math.nan])
    gradient = _largest([row.gradient for row in rows if row.gradient is not None] or [math.nan])
    return text + (
        f"\n{len(rows) - idle} of {product} cases in {seconds:.0f} s, {len(failures)} failed"
        f"{f', {idle} not run (see above)' if idle else ''}; "
        f"largest difference: loss {loss:.1e} (tolerance {LOSS_TOLERANCE:g}), "
        f"gradient {gradient:.1e} (tolerance {GRADIENT_TOLERANCE:g})"
    )
