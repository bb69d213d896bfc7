"""What goes wrong in training runs, done on purpose: each fault, how it was detected, what it cost, and that nothing was lost.

    chatmill doctor --faults [--only kill,hang] [--seed 7] [--out faults.json]
    python -m chatmill.launcher.doctor.faults

Every row is a real run of two processes (gloo, so no GPU is needed) on a data set made here, under the supervisor that Slurm
jobs run under; fault_injection.py makes the fault happen in one rank. steps lost: computed before the fault and again
after it. seconds: from the fault to the first step of the run that goes on. kept: every step's tokens and loss equal those of
a run to which nothing happened (the loss bit for bit with the same engine and world size), or, where dialogues are left out by
intention, those of a run that left them out from the beginning. Takes about six minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from chatmill.run_files import read_jsonl

from ..supervise.run_state import attempts

STEPS, EVERY = 12, 4
HANG_S = 8


@dataclass(frozen=True)
class Row:
    """One line of the table. steps_lost, seconds: None where the run ends by intention. kept: nothing was lost."""

    fault: str
    detected: str
    steps_lost: int | None
    seconds: float | None
    kept: bool


class Bench:
    """A folder with a data set, and runs in it. seed: of the steps at which faults come that may come at any step."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.vocab = make_data(folder / "data")
        self._reference: list[tuple[float, int, int]] = []

    def recipe(self, name: str, **sections: dict[str, Any]) -> Path:
        """A recipe of two processes, in a file."""
        shape = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "context": 128}
        values: dict[str, dict[str, Any]] = {
            "run": {"name": name, "dir": str(self.folder / "runs")},
            "data": {"path": str(self.folder / "data"), "sequence_length": 128},
            "model": {"vocab_size": self.vocab, **shape},
            "optimizer": {"lr": 3e-3},
            "train": {"steps": STEPS, "accumulation": 2, "precision": "fp32", "cpu_threads": 1, "hang_timeout_s": HANG_S},
            "parallel": {"strategy": "ddp"},
            "checkpoint": {"every_steps": EVERY, "keep": 9},
            "evaluation": {"at_start": False},
        }
        for section, fields in sections.items():
            values[section] = values.get(section, {}) | fields
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def run(
        self, recipe: Path, *overrides: str, fault: str = "", processes: int = 2, supervised: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """The recipe under the supervisor (which starts it again), with a fault in it; ends when the supervisor does."""
        run = self.run_of(recipe)
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CHATMILL_FAULT")
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "CHATMILL_RUN_DIR": str(run), "PYTHONUNBUFFERED": "1"}
        environment |= {"CHATMILL_FAULT": fault} if fault else {}
        command = [sys.executable, "-m", "chatmill.launcher.supervise", "--run-dir", str(run), "--"]
        command = command if supervised else []
        command += [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        logs = "{attempt-logs}" if supervised else str(run / "logs" / "alone")
        command += ["--max-restarts=0", f"--log-dir={logs}/node-0", "--redirects=3"]
        command += ["-m", "chatmill.launcher.doctor.fault_injection", str(recipe), *overrides]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def run_of(self, recipe: Path) -> Path:
        """Run folder of a recipe."""
        return self.folder / "runs" / recipe.stem

    def steps(self, recipe: Path) -> list[tuple[float, int, int]]:
        """(loss, tokens, tokens with loss) of every step that the run's metrics hold."""
        lines = read_jsonl(self.run_of(recipe) / "metrics.jsonl")
        return [(line["loss"], line["tokens"], line["loss_tokens"]) for line in lines if "loss" in line]

    def reference(self) -> list[tuple[float, int, int]]:
        """The steps of the run to which nothing happens."""
        if not self._reference:
            recipe = self.recipe("reference")
            done = self.run(recipe)
            self._reference = self.steps(recipe)
            if len(self._reference) != STEPS:
                raise RuntimeError(f"the reference run did not finish:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return self._reference

    def is_kept(self, recipe: Path, tolerance: float = 0.0) -> bool:
        """Whether every step had the reference's tokens, and its loss within a relative tolerance."""
        found, wanted = self.steps(recipe), self.reference()
        return [step[1:] for step in found] == [step[1:] for step in wanted] and all(
            abs(a[0] - b[0]) <= tolerance * abs(b[0]) for a, b in zip(found, wanted, strict=True)
        )

    def cost(self, recipe: Path) -> tuple[int, float]:
        """(steps lost, seconds from the fault to the first step afterwards)."""
        run = self.run_of(recipe)
        fault = json.loads((run / "logs" / "fault.json").read_text(encoding="utf-8"))
        later = (e for e in read_jsonl(run / "events.jsonl") if e["time"] >= fault["time"])
        again = [e for e in later if e["event"] in ("start", "resume")]
        began, since = (again[0]["step"], again[0]["time"]) if again else (0, fault["time"])
        first = min((m["time"] for m in read_jsonl(run / "metrics.jsonl") if m.get("time", 0) > since), default=0.0)
        return max(0, fault["step"] - 1 - began), round(first - fault["time"], 1)

    def events(self, recipe: Path, kind: str) -> list[dict[str, Any]]:
        """Events of a kind."""
        return [e for e in read_jsonl(self.run_of(recipe) / "events.jsonl") if e["event"] == kind]

    def cause(self, recipe: Path) -> str:
        """First cause of the first attempt that failed."""
        return next((str(a.cause) for a in attempts(self.run_of(recipe)) if a.outcome == "failed"), "")


def make_data(folder: Path, dialogues: int = 240) -> int:
    """A small data-set folder; returns the size of its vocabulary."""
    from ...data.pipeline.pipeline import build_dataset
    from ...data.recipe import DataRecipe

    rng = random.Random(0)
    words = ("cat", "dog", "boat", "tree", "river", "lamp", "stone", "bird", "cloud", "road")
    raw = folder.with_suffix(".jsonl")
    with raw.open("w", encoding="utf-8") as handle:
        for _ in range(dialogues):
            thing, number = rng.choice(words), rng.randint(1, 999)
            question = {"role": "user", "content": f"Where is {thing} number {number}?"}
            answer = {"role": "assistant", "content": f"The {thing} with number {number} is here."}
            handle.write(json.dumps({"messages": [question, answer]}) + "\n")
    source = {"format": "openai", "path": str(raw)}
    tokenizer = {"train": {"vocab_size": 320}}
    values = {"name": "faults", "out": str(folder), "sources": [source], "split": {"validation": 0.1}, "tokenizer": tokenizer}
    build_dataset(DataRecipe.model_validate(values))
    return int(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["vocab_size"])


# ---------------------------------------------------------------- the faults


def killed(bench: Bench) -> Row:
    """kill -9 of a rank: the other one ends, the supervisor starts both again."""
    recipe = bench.recipe("killed")
    bench.run(recipe, fault="kill:1:7")
    return Row("kill -9 of a rank", bench.cause(recipe), *bench.cost(recipe), bench.is_kept(recipe))


def moved(bench: Bench) -> Row:
    """kill -9 at a random step; the run goes on with another engine and another world size."""
    recipe = bench.recipe("moved")
    step = bench.chance.randint(EVERY + 1, STEPS - 1)
    code = bench.run(recipe, fault=f"kill:0:{step}", supervised=False).returncode
    bench.run(recipe, "parallel.strategy=fsdp2", "train.accumulation=1", processes=4)
    found = f"kill -9 at step {step} under DDP on 2, continued by FSDP2 on 4"
    detected = f"the group ended with exit code {code}; tokens and losses equal to 2e-5"
    return Row(found, detected, *bench.cost(recipe), bench.is_kept(recipe, 2e-5))


def terminated(bench: Bench) -> Row:
    """SIGTERM to one rank: all stop after the step, with a checkpoint; the same command goes on."""
    recipe = bench.recipe("terminated")
    bench.run(recipe, fault="term:1:6")
    found = next((f"{e['event']} at step {e['step']}" for e in bench.events(recipe, "preempted")), "not noticed")
    bench.run(recipe)
    return Row("SIGTERM to one rank", found, *bench.cost(recipe), bench.is_kept(recipe))


def in_validation(bench: Bench) -> Row:
    """SIGUSR1 while a validation runs."""
    recipe = bench.recipe("validation", evaluation={"at_start": False, "every_steps": 6})
    bench.run(recipe, fault="validation-usr1:1:6")
    found = next((f"{e['event']} at step {e['step']}" for e in bench.events(recipe, "preempted")), "not noticed")
    bench.run(recipe)
    return Row("SIGUSR1 in a validation", found, *bench.cost(recipe), bench.is_kept(recipe))


def in_save(bench: Bench) -> Row:
    """kill -9 while a checkpoint is being written: it is never seen, the one before is used."""
    recipe = bench.recipe("save")
    bench.run(recipe, fault="save-kill:1:8")
    left = [p.name for p in (bench.run_of(recipe) / "checkpoints").iterdir() if p.name.startswith(".")]
    kept = bench.is_kept(recipe) and not left
    return Row("kill -9 while saving", bench.cause(recipe), *bench.cost(recipe), kept)


def flipped(bench: Bench) -> Row:
    """A bit of the newest checkpoint is flipped on disk."""
    recipe = bench.recipe("flipped")
    bench.run(recipe, fault="term:0:9")
    newest = max((bench.run_of(recipe) / "checkpoints").glob("step-*"))
    victim = max(newest.glob("model-*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-5] ^= 8
    victim.write_bytes(data)
    began = time.time()
    bench.run(recipe)
    events = bench.events(recipe, "damaged_checkpoint")
    found = f"{victim.name} of {newest.name}; {events[0]['using']} used" if events else "not noticed"
    good = int(events[0]["using"].split("-")[1]) if events else 0
    first = min(
        (m["time"] for m in read_jsonl(bench.run_of(recipe) / "metrics.jsonl") if m.get("time", 0) > began), default=began
    )
    kept = bench.is_kept(recipe) and bool(events) and victim.name in str(events[0]["problems"])
    return Row("bit flipped in a checkpoint", found, 9 - good, round(first - began, 1), kept)


def full_disk(bench: Bench) -> Row:
    """No file may grow any more on one rank: training goes on to its end, the old checkpoint stays, later all is computed."""
    recipe = bench.recipe("disk")
    bench.run(recipe, fault="disk:1:6")
    failed = bench.events(recipe, "checkpoint_failed")
    steps = len(bench.steps(recipe))
    old = [p.name for p in (bench.run_of(recipe) / "checkpoints").glob("step-*")]
    bench.run(recipe)
    found = f"{failed[0]['reason'][:60]}...; trained to step {steps}, kept {old}" if failed else "not noticed"
    kept = bench.is_kept(recipe) and steps == STEPS and old == [f"step-{EVERY:08d}"]
    return Row("disk full on one rank", found, STEPS - EVERY, None, kept)


def disk_without_room(bench: Bench) -> Row:
    """Nothing at all can be written on rank 0 for four steps, records and log included: not even a restart."""
    recipe = bench.recipe("room")
    bench.run(recipe, fault="full-disk:0:6")
    found = bench.events(recipe, "disk_full")
    tried = attempts(bench.run_of(recipe))
    said = f"{found[0]['waited']} records waited {found[0]['seconds']:.1f} s in memory" if found else "not noticed"
    kept = bench.is_kept(recipe) and bool(found) and len(tried) == 1 and tried[0].step_after == STEPS
    return Row("no room for any file, then some", said, 0, 0.0, kept)


def hung(bench: Bench) -> Row:
    """A rank is stopped (SIGSTOP): it is named, the group ends and starts again."""
    recipe = bench.recipe("hung")
    bench.run(recipe, fault="stop:1:7")
    events = bench.events(recipe, "hang")
    kept = bench.is_kept(recipe) and bool(events) and events[0]["ranks"] == [1]
    return Row(f"hung rank ({HANG_S} s allowed)", bench.cause(recipe), *bench.cost(recipe), kept)


def not_a_number(bench: Bench) -> Row:
    """NaN on one rank: the update is left out on both."""
    recipe = bench.recipe("nan")
    bench.run(recipe, fault="nan:1:7")
    events = bench.events(recipe, "skipped_step")
    found = f"step {events[0]['step']} left out, {len(events[0]['uids'])} dialogues named" if events else "not noticed"
    steps, wanted = bench.steps(recipe), bench.reference()
    finite = all(math.isfinite(loss) for i, (loss, *_) in enumerate(steps) if i != 6)
    same_tokens = [step[1:] for step in steps] == [step[1:] for step in wanted]
    kept = len(events) == 1 and same_tokens and finite and steps[:6] == wanted[:6]
    return Row("NaN on one rank", found, 0, 0.0, kept)


def spike(bench: Bench) -> Row:
    """A loss spike on one rank: rolled back, the dialogues of the step excluded."""
    guard = {"on_spike": "rollback", "min_history": 4, "spike_z": 50.0}
    recipe = bench.recipe("spike", guard=guard)
    bench.run(recipe, fault="spike:1:7")
    events = bench.events(recipe, "rollback")
    if not events:
        return Row("loss spike on one rank", "not noticed", None, None, False)
    lines = list(read_jsonl(bench.run_of(recipe) / "excluded.jsonl"))
    clean = bench.recipe("clean")
    values = yaml.safe_load(clean.read_text(encoding="utf-8"))
    values["data"]["exclude"] = [{"step": line["step"], "uids": line["uids"]} for line in lines]
    clean.write_text(yaml.safe_dump(values), encoding="utf-8")
    bench.run(clean)
    lost = events[0]["step"] - events[0]["to_step"] - 1
    found = f"rolled back from step {events[0]['step']} to {events[0]['to_step']}, {events[0]['excluded']} dialogues excluded"
    return Row("loss spike on one rank", found, lost, bench.cost(recipe)[1], bench.steps(recipe) == bench.steps(clean))


def crash_loop(bench: Bench) -> Row:
    """An error before the first checkpoint, every time: the supervisor gives up."""
    recipe = bench.recipe("crash")
    done = bench.run(recipe, fault="always-raise:1:2")
    count = len(attempts(bench.run_of(recipe)))
    found = f"given up after {count} attempts: {bench.cause(recipe)}"
    return Row("crash before the first save", found, None, None, done.returncode == 1 and count == 3)


def wrong_recipe(bench: Bench) -> Row:
    """A field that does not exist."""
    began = time.time()
    done = bench.run(bench.recipe("wrong"), "optimizer.lrr=1")
    count = len(attempts(bench.folder / "runs" / "wrong"))
    found = bench.cause(bench.folder / "wrong.yaml")
    return Row("wrong recipe", found, 0, round(time.time() - began, 1), done.returncode == 2 and count == 1 and "lrr" in found)


def torn_data(bench: Bench) -> Row:
    """A bit of a token shard is flipped: named; with the file restored the run goes on."""
    recipe = bench.recipe("data")
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["data"]["path"] = str(bench.folder / "torn")
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    shutil.copytree(bench.folder / "data", bench.folder / "torn")
    shard = max((bench.folder / "torn" / "train").glob("*.tar"), key=lambda p: p.stat().st_size)
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    began = time.time()
    bench.run(recipe)
    found = bench.cause(recipe)
    seconds = round(time.time() - began, 1)
    shard.write_bytes(whole)
    bench.run(recipe)
    return Row("bit flipped in a token shard", found, 0, seconds, shard.name in found and bench.is_kept(recipe))


FAULTS: dict[str, Callable[[Bench], Row]] = {
    "term": terminated,
    "validation": in_validation,
    "kill": killed,
    "moved": moved,
    "save": in_save,
    "flip": flipped,
    "disk": full_disk,
    "room": disk_without_room,
    "hang": hung,
    "nan": not_a_number,
    "spike": spike,
    "crash": crash_loop,
    "recipe": wrong_recipe,
    "data": torn_data,
}


def show(row: Row) -> str:
    """A line of the table."""
    lost = "-" if row.steps_lost is None else str(row.steps_lost)
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    words = " ".join(row.detected.split())
    detected = words if len(words) <= 110 else words[:107] + "..."
    return f"{row.fault:<30} {lost:>10} {seconds:>8}  {'yes' if row.kept else 'NO':<4}  {detected}"


def main(arguments: list[str] | None = None) -> int:
    """Run the faults, print the table; 1 where something was lost or not noticed."""
    parser = argparse.ArgumentParser(prog="chatmill doctor --faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help=f"comma-separated, of: {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, help="repeat the random steps of an earlier call (printed there)")
    parser.add_argument("--out", type=Path, help="also write the table as JSON to this file")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(FAULTS)
    unknown = sorted(set(names) - set(FAULTS))
    if unknown:
        parser.error(f"no fault {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    seed = random.SystemRandom().randrange(10_000) if options.seed is None else options.seed
    rows = []
    with tempfile.TemporaryDirectory(prefix="chatmill-faults-") as folder:
        bench = Bench(Path(folder), seed)
        print(f"seed {seed}")
        print(f"{'fault':<30} {'steps lost':>10} {'seconds':>8}  kept  detected")
        for name in names:
            rows.append(FAULTS[name](bench))
            print(show(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    lost = [row.fault for row in rows if not row.kept]
    print(f"lost or not noticed: {', '.join(lost)}" if lost else f"{len(rows)} faults; nothing was lost in any")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
