"""What goes wrong in training runs, done on purpose: how each fault was noticed, what it cost, and that nothing was lost.

    chatmill doctor --faults [--only kill,hang] [--seed 7] [--out faults.json]
    python -m chatmill.launcher.doctor.faults

Every row is a real run of two processes (gloo, so no GPU is needed) on a data set made here, under the supervisor that Slurm
jobs run under; fault_injection.py makes the fault happen in one rank. steps lost: computed before the fault and again
after it. seconds: from the fault to the first step of the run that continues. kept: every step's tokens and loss equal those of
an undisturbed run (the loss bit for bit with the same engine and world size), or, where dialogues are left out on purpose,
those of a run that left them out from the beginning. Takes about six minutes on two cores.
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

from chatmill.files import replace_text
from chatmill.run_files import read_jsonl

from ..supervise.run_state import Attempt, attempts
from ..supervise.supervise import LOGS

STEPS, EVERY = 12, 4
HANG_S = 8
UNNOTICED = "not noticed"


@dataclass(frozen=True)
class FaultResult:
    """One line of the table. steps_lost, seconds: None where the run ends on purpose. kept: nothing was lost."""

    fault: str
    detected: str
    steps_lost: int | None
    seconds: float | None
    kept: bool


class Bench:
    """A folder with a data set, and runs in it. seed: chooses the steps of faults that may come at any step."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.vocab = make_data(folder / "data")
        self._reference: list[tuple[float, int, int]] = []

    def reference(self) -> list[tuple[float, int, int]]:
        """The steps of an undisturbed run."""
        if not self._reference:
            run = FaultyRun(self, "reference")
            done = run.start()
            self._reference = run.steps()
            if len(self._reference) != STEPS:
                raise RuntimeError(f"the reference run did not finish:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return self._reference


class FaultyRun:
    """A recipe for two processes, and the run that it makes in the bench's folder."""

    def __init__(self, bench: Bench, name: str, **sections: dict[str, Any]) -> None:
        shape = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "context": 128}
        values: dict[str, dict[str, Any]] = {
            "run": {"name": name, "dir": str(bench.folder / "runs")},
            "data": {"path": str(bench.folder / "data"), "sequence_length": 128},
            "model": {"vocab_size": bench.vocab, **shape},
            "optimizer": {"lr": 3e-3},
            "train": {"steps": STEPS, "accumulation": 2, "precision": "fp32", "cpu_threads": 1, "hang_timeout_s": HANG_S},
            "parallel": {"strategy": "ddp"},
            "checkpoint": {"every_steps": EVERY, "keep": 9},
            "evaluation": {"at_start": False},
        }
        for section, fields in sections.items():
            values[section] = values.get(section, {}) | fields
        self.bench, self.folder, self.recipe = bench, bench.folder / "runs" / name, bench.folder / f"{name}.yaml"
        self.recipe.write_text(yaml.safe_dump(values), encoding="utf-8")

    def start(
        self, *overrides: str, fault: str = "", processes: int = 2, supervised: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Train under the supervisor (which starts it again), with a fault in it; ends when the supervisor does."""
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CHATMILL_FAULT")
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "CHATMILL_RUN_DIR": str(self.folder), "PYTHONUNBUFFERED": "1"}
        environment |= {"CHATMILL_FAULT": fault} if fault else {}
        supervisor = [sys.executable, "-m", "chatmill.launcher.supervise", "--run-dir", str(self.folder), "--"]
        command = [*(supervisor if supervised else []), sys.executable, "-m", "torch.distributed.run", "--standalone"]
        logs = LOGS if supervised else str(self.folder / "logs" / "alone")
        command += [f"--nproc-per-node={processes}", "--max-restarts=0", f"--log-dir={logs}/node-0", "--redirects=3"]
        command += ["-m", "chatmill.launcher.doctor.fault_injection", str(self.recipe), *overrides]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def steps(self) -> list[tuple[float, int, int]]:
        """(loss, tokens, tokens with loss) of every step that the run's metrics hold."""
        lines = read_jsonl(self.folder / "metrics.jsonl")
        return [(line["loss"], line["tokens"], line["loss_tokens"]) for line in lines if "loss" in line]

    def is_kept(self, tolerance: float = 0.0) -> bool:
        """Whether every step had the reference's tokens, and its loss within a relative tolerance."""
        found, wanted = self.steps(), self.bench.reference()
        return [step[1:] for step in found] == [step[1:] for step in wanted] and all(
            abs(a[0] - b[0]) <= tolerance * abs(b[0]) for a, b in zip(found, wanted, strict=True)
        )

    def cost(self) -> tuple[int, float]:
        """(steps lost, seconds from the fault to the first step afterwards)."""
        fault = json.loads((self.folder / "logs" / "fault.json").read_text(encoding="utf-8"))
        later = (e for e in read_jsonl(self.folder / "events.jsonl") if e["time"] >= fault["time"])
        again = [e for e in later if e["event"] in ("start", "resume")]
        began, since = (again[0]["step"], again[0]["time"]) if again else (0, fault["time"])
        return max(0, fault["step"] - 1 - began), round(self.first_step_after(since) - fault["time"], 1)

    def first_step_after(self, since: float) -> float:
        """When the first metrics line after `since` was written."""
        return min((m["time"] for m in read_jsonl(self.folder / "metrics.jsonl") if m.get("time", 0) > since), default=since)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind."""
        return [e for e in read_jsonl(self.folder / "events.jsonl") if e["event"] == kind]

    def attempts(self) -> list[Attempt]:
        """The supervisor's attempts."""
        return attempts(self.folder)

    def cause(self) -> str:
        """First cause of the first attempt that failed."""
        return next((str(a.cause) for a in self.attempts() if a.outcome == "failed"), "")

    def checkpoints(self) -> list[Path]:
        """What lies in the folder of checkpoints, leftovers of a save included."""
        return sorted((self.folder / "checkpoints").iterdir())


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


def flip_bit(file: Path, at: int) -> bytes:
    """Flip one bit of a file; returns what it held before."""
    whole = file.read_bytes()
    data = bytearray(whole)
    data[at] ^= 8
    file.write_bytes(data)
    return whole


# ---------------------------------------------------------------- the faults


def killed(bench: Bench) -> FaultResult:
    """kill -9 of a rank: the other one ends, the supervisor restarts both."""
    run = FaultyRun(bench, "killed")
    run.start(fault="kill:1:7")
    return FaultResult("kill -9 of a rank", run.cause(), *run.cost(), run.is_kept())


def moved(bench: Bench) -> FaultResult:
    """kill -9 at a random step; the run continues with another engine and another world size."""
    run = FaultyRun(bench, "moved")
    step = bench.chance.randint(EVERY + 1, STEPS - 1)
    code = run.start(fault=f"kill:0:{step}", supervised=False).returncode
    run.start("parallel.strategy=fsdp2", "train.accumulation=1", processes=4)
    title = f"kill -9 at step {step} under DDP on 2, continued by FSDP2 on 4"
    detected = f"the group ended with exit code {code}; tokens and losses equal to 2e-5"
    return FaultResult(title, detected, *run.cost(), run.is_kept(2e-5))


def _asked_to_stop(title: str, fault: str, run: FaultyRun) -> FaultResult:
    """A signal to one rank: all stop after the step, with a checkpoint; the same command continues."""
    run.start(fault=fault)
    detected = next((f"{e['event']} at step {e['step']}" for e in run.events("preempted")), UNNOTICED)
    run.start()
    return FaultResult(title, detected, *run.cost(), run.is_kept())


def terminated(bench: Bench) -> FaultResult:
    """SIGTERM in a step."""
    return _asked_to_stop("SIGTERM to one rank", "term:1:6", FaultyRun(bench, "terminated"))


def in_validation(bench: Bench) -> FaultResult:
    """SIGUSR1 while a validation runs."""
    run = FaultyRun(bench, "validation", evaluation={"every_steps": 6})
    return _asked_to_stop("SIGUSR1 in a validation", "validation-usr1:1:6", run)


def in_save(bench: Bench) -> FaultResult:
    """kill -9 while a checkpoint is being written: it is never seen, the one before is used."""
    run = FaultyRun(bench, "save")
    run.start(fault="save-kill:1:8")
    left = [folder for folder in run.checkpoints() if folder.name.startswith(".")]
    return FaultResult("kill -9 while saving", run.cause(), *run.cost(), run.is_kept() and not left)


def flipped(bench: Bench) -> FaultResult:
    """A bit of the newest checkpoint is flipped on disk."""
    run = FaultyRun(bench, "flipped")
    run.start(fault="term:0:9")
    newest = run.checkpoints()[-1]
    victim = max(newest.glob("model-*.safetensors"), key=lambda p: p.stat().st_size)
    flip_bit(victim, -5)
    began = time.time()
    run.start()
    events = run.events("damaged_checkpoint")
    detected = f"{victim.name} of {newest.name}; {events[0]['using']} used" if events else UNNOTICED
    good = int(events[0]["using"].split("-")[1]) if events else 0
    kept = run.is_kept() and bool(events) and victim.name in str(events[0]["problems"])
    return FaultResult("bit flipped in a checkpoint", detected, 9 - good, round(run.first_step_after(began) - began, 1), kept)


def full_disk(bench: Bench) -> FaultResult:
    """No file can grow any more on one rank: training goes on to its end, the old checkpoint stays, later all is computed."""
    run = FaultyRun(bench, "disk")
    run.start(fault="disk:1:6")
    failed, steps = run.events("checkpoint_failed"), len(run.steps())
    old = [folder.name for folder in run.checkpoints() if folder.name.startswith("step-")]
    run.start()
    detected = f"{failed[0]['reason'][:60]}...; trained to step {steps}, kept {old}" if failed else UNNOTICED
    kept = run.is_kept() and steps == STEPS and old == [f"step-{EVERY:08d}"]
    return FaultResult("disk full on one rank", detected, STEPS - EVERY, None, kept)


def disk_without_room(bench: Bench) -> FaultResult:
    """Nothing at all can be written on rank 0 for four steps, records and log included: not even a restart."""
    run = FaultyRun(bench, "room")
    run.start(fault="full-disk:0:6")
    found, tried = run.events("disk_full"), run.attempts()
    detected = f"{found[0]['waited']} records waited {found[0]['seconds']:.1f} s in memory" if found else UNNOTICED
    kept = run.is_kept() and bool(found) and len(tried) == 1 and tried[0].step_after == STEPS
    return FaultResult("no room for any file, then some", detected, 0, 0.0, kept)


def hung(bench: Bench) -> FaultResult:
    """A rank is stopped (SIGSTOP): it is named, the group ends and is restarted."""
    run = FaultyRun(bench, "hung")
    run.start(fault="stop:1:7")
    kept = run.is_kept() and [event["ranks"] for event in run.events("hang")][:1] == [[1]]
    return FaultResult(f"hung rank ({HANG_S} s allowed)", run.cause(), *run.cost(), kept)


def not_a_number(bench: Bench) -> FaultResult:
    """NaN on one rank: the update is left out on both."""
    run = FaultyRun(bench, "nan")
    run.start(fault="nan:1:7")
    events = run.events("skipped_step")
    detected = f"step {events[0]['step']} left out, {len(events[0]['uids'])} dialogues named" if events else UNNOTICED
    steps, wanted = run.steps(), bench.reference()
    finite = all(math.isfinite(loss) for i, (loss, *_) in enumerate(steps) if i != 6)
    same_tokens = [step[1:] for step in steps] == [step[1:] for step in wanted]
    kept = len(events) == 1 and same_tokens and finite and steps[:6] == wanted[:6]
    return FaultResult("NaN on one rank", detected, 0, 0.0, kept)


def spike(bench: Bench) -> FaultResult:
    """A loss spike on one rank: rolled back, the dialogues of the step excluded."""
    title = "loss spike on one rank"
    run = FaultyRun(bench, "spike", guard={"on_spike": "rollback", "min_history": 4, "spike_z": 50.0})
    run.start(fault="spike:1:7")
    events = run.events("rollback")
    if not events:
        return FaultResult(title, UNNOTICED, None, None, False)
    excluded = [{"step": line["step"], "uids": line["uids"]} for line in read_jsonl(run.folder / "excluded.jsonl")]
    clean = FaultyRun(bench, "clean", data={"exclude": excluded})
    clean.start()
    at, to = events[0]["step"], events[0]["to_step"]
    detected = f"rolled back from step {at} to {to}, {events[0]['excluded']} dialogues excluded"
    return FaultResult(title, detected, at - to - 1, run.cost()[1], run.steps() == clean.steps())


def crash_loop(bench: Bench) -> FaultResult:
    """An error before the first checkpoint, every time: the supervisor gives up."""
    run = FaultyRun(bench, "crash")
    code = run.start(fault="always-raise:1:2").returncode
    count = len(run.attempts())
    detected = f"given up after {count} attempts: {run.cause()}"
    return FaultResult("crash before the first save", detected, None, None, code == 1 and count == 3)


def wrong_recipe(bench: Bench) -> FaultResult:
    """A field that does not exist."""
    run, began = FaultyRun(bench, "wrong"), time.time()
    code = run.start("optimizer.lrr=1").returncode
    kept = code == 2 and len(run.attempts()) == 1 and "lrr" in run.cause()
    return FaultResult("wrong recipe", run.cause(), 0, round(time.time() - began, 1), kept)


def torn_data(bench: Bench) -> FaultResult:
    """A bit of a token shard is flipped: named; with the file restored the run continues."""
    torn = bench.folder / "torn"
    shutil.copytree(bench.folder / "data", torn)
    run = FaultyRun(bench, "data", data={"path": str(torn)})
    shard = max((torn / "train").glob("*.tar"), key=lambda p: p.stat().st_size)
    whole = flip_bit(shard, shard.stat().st_size // 2)
    began = time.time()
    run.start()
    seconds, cause = round(time.time() - began, 1), run.cause()
    shard.write_bytes(whole)
    run.start()
    return FaultResult("bit flipped in a token shard", cause, 0, seconds, shard.name in cause and run.is_kept())


FAULTS: dict[str, Callable[[Bench], FaultResult]] = {
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


def show(row: FaultResult) -> str:
    """A line of the table."""
    lost = "-" if row.steps_lost is None else str(row.steps_lost)
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    words = " ".join(row.detected.split())
    detected = words if len(words) <= 110 else words[:107] + "..."
    return f"{row.fault:<30} {lost:>10} {seconds:>8}  {'yes' if row.kept else 'NO':<4}  {detected}"


def main(arguments: list[str] | None = None) -> int:
    """Run the faults and print the table; 1 if something was lost or not detected."""
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
        replace_text(options.out, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    lost = [row.fault for row in rows if not row.kept]
    print(f"lost or not noticed: {', '.join(lost)}" if lost else f"{len(rows)} faults; nothing was lost in any")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
