"""Everything that needs a GPU, in one run: `make gpu`, or some parts: `make gpu ARGS="--parts tests,bench"`.

Parts, the most valuable first:

    imports    whether everything that follows can be imported; if not, what to carry in wheels/ (`make wheels`)
    tests      each Triton kernel against its reference, and the trainer on CUDA; in parallel, a hang or crash costs one test
    timed      the tests that read a clock, alone on the machine
    attention, loss, layer, decode    our kernels against other libraries
    train      1B and 8B in bf16 at T=4096: tokens/s, MFU, a profile; then compiled, with other attentions, SmolLM2
    engines    FSDP2 and DDP with NCCL in a world of one
    tune       refits the table of attention tiles (into results/, to be reviewed and committed)

Every part is a process of its own with a time limit, and results/gpu.json is written every few seconds, so a timeout costs only
the part that is running. Parts run in the order given, and a failed part does not stop the others. results/ holds at most
8 files: summary.txt (gpu.json for people), gpu.json, tests.jsonl, log.txt, operators.txt, trace.json.gz, attention.json.
`bench`, `fast` and `all` name groups of parts; `first` and `second` are the two commands of a visit of fifteen minutes
(gpu_visit.py), which --dry rehearses without a GPU. Without a GPU the script says so and exits 0. Nothing is downloaded:
missing packages are installed from --wheels into --site.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_log import read_log
from gpu_summary import summary

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = (
    "chatmill.kernels.bench.harness",
    "chatmill.data.pipeline.pipeline",
    "chatmill.trainer.loop.loop",
    "chatmill.trainer.generation.generation",
    "chatmill.launcher.__main__",
    "pytest",
    "hypothesis",
)
# test files whose kernels run compiled on a GPU; GPU tests come first in each shard
TESTS = (
    "kernels/attention/test_attention_gpu.py",
    "kernels/attention/test_attention_hopper_gpu.py",
    "kernels/layer/test_layer_gpu.py",
    "trainer/loop/test_training_gpu.py",
    "data/packing/test_stream_gpu.py",
    "trainer/plan/test_plan.py::test_a_step_on_a_gpu_needs_what_the_plan_says",
    "kernels/attention/test_attention_triton.py",
    "kernels/attention/test_attention_hopper_backward.py",
    "kernels/attention/test_attention_decode.py",
    "kernels/cross_entropy/test_linear_cross_entropy_triton.py",
    "kernels/cross_entropy/test_linear_cross_entropy.py",
    "kernels/cross_entropy/test_cross_entropy.py",
    "kernels/layer/test_rms_norm.py",
    "kernels/layer/test_rope.py",
    "kernels/layer/test_swiglu.py",
    "kernels/test_whole_model.py",
)
TIMED = "time_follows"
BENCHES = {
    "attention": (["attention"], ["T8192 mean500", "D128 S8192 H16/4", "D128 T8192 mean100", "D64 S4096", "D128 T32768"]),
    "loss": (["linear_cross_entropy", "cross_entropy"], ["V128256 loss", "V49152 loss 50%", "plain N8192 V1"]),
    "layer": (["rms_norm", "swiglu", "rope"], ["H2048", "F8192", "D128"]),
    "decode": (["decode_attention"], [""]),
}  # fmt: skip
# Packs of a micro-batch by arithmetic (`chatmill plan 1b --gpu h200`), in GiB of 139: 1B 58 with 8 packs, 98 with 16; 8B 120 of
# weights, gradients and AdamW, and one layer's activations or (8-bit) all. Clipping and AdamW move 40 bytes a parameter: 2.5 %
# of a step of 32,768 tokens.
AT_4096 = ["data.sequence_length=4096", "train.activation_checkpointing=false"]
BILLION = ["--recipe", "1b", *AT_4096, "train.micro_batch=8"]
EIGHT = ["--recipe", "8b", *AT_4096, "train.micro_batch=6", "--steps", "10"]
TRAININGS = {
    "1b": [*BILLION, "logging.profile_steps=[14,15]"],
    "8b full checkpointing": [*EIGHT, "train.activation_checkpointing=full"],
    "8b checkpointing of 26 of 32 layers": [
        *EIGHT,
        "train.micro_batch=5",
        "train.activation_checkpointing=full",
        "train.activation_checkpointing_layers=26",
    ],
    "8b selective checkpointing": [*EIGHT, "train.activation_checkpointing=selective"],
    "1b compiled": [*BILLION, "train.compile=true"],
    "1b hopper": [*BILLION, "kernels.attention=hopper"],
    "1b 16 packs": [*BILLION, "train.micro_batch=16", "--steps", "14"],
    "8b without checkpointing, 8-bit AdamW": [*EIGHT, "train.micro_batch=3", "optimizer.name=adamw8bit"],
    "1b sdpa": [*BILLION, "kernels.attention=sdpa"],
    "smollm2-135m": ["--recipe", "smollm2-135m"],
    "smollm2-135m compiled": ["--recipe", "smollm2-135m", "train.compile=true"],
    "1b packs of 8192, selective": [*BILLION, "data.sequence_length=8192", "train.activation_checkpointing=selective"],
}
SMALL = ["--recipe", "1b", "model.layers=4", "data.sequence_length=2048", "--steps", "8"]
ENGINES = {name: [*SMALL, f"parallel.strategy={name}"] for name in ("fsdp2", "ddp")}
# part -> seconds at most
PARTS = {
    "imports": 60,
    "tests": 270,
    "timed": 60,
    "attention": 90,
    "loss": 80,
    "layer": 45,
    "decode": 30,
    "train": 400,
    "engines": 80,
    "tune": 420,
}
GROUPS = {"all": tuple(PARTS), "bench": tuple(BENCHES), "fast": ("imports", "tests", "timed")}


class Report:
    """results/gpu.json, rewritten after every change."""

    def __init__(self, out: Path) -> None:
        self._path = out / "gpu.json"
        self.content: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.content.setdefault("parts", {})

    def put(self, part: str, **figures: Any) -> None:
        self.content["parts"].setdefault(part, {}).update(figures)
        self.write()

    def write(self) -> None:
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self.content, indent=1) + "\n")
        fresh.replace(self._path)
        self._path.with_name("summary.txt").write_text(summary(self.content), encoding="utf-8")


class Check:
    """The parts and what they share: where results go and how much time is left.

    grace_s: what a process that is told to end has before it is killed; torchrun needs some seconds.
    """

    is_dry, grace_s = False, 8.0

    def __init__(self, out: Path, budget_s: float, jobs: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.jobs = out, jobs
        self.report = Report(out)
        self.scratch = Path(tempfile.mkdtemp(prefix="chatmill-gpu-"))
        self.log = (out / "log.txt").open("a")
        self._end = self.now() + budget_s
        self._data: subprocess.Popen[bytes] | None = None
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

    def now(self) -> float:
        """Seconds of a clock that only goes on."""
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def end(self, process: Any) -> None:
        """Kill a process and its children."""
        end_session(process, self.grace_s)

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._end - self.now()

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """A process in a session of its own, whose output goes to the log."""
        self.log.write(f"\n$ {' '.join(command)}\n")
        self.log.flush()
        return subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=self.environment | environment, cwd=ROOT, start_new_session=True
        )

    def wait(self, running: Sequence[subprocess.Popen[bytes]], limit_s: float, news: Callable[[], None]) -> list[int | None]:
        """Exit codes, None for processes that had to be killed; `news` is called every two seconds and at the end."""
        end = self.now() + min(limit_s, self.left_s())
        while any(process.poll() is None for process in running) and self.now() < end:
            self.pause(min(2.0, max(0.05, end - self.now())))
            news()
        codes = [process.poll() for process in running]
        for process, code in zip(running, codes, strict=True):
            if code is None:
                self.end(process)
        news()
        return codes

    def run(self, part: str, name: str, command: Sequence[str], limit_s: float, result: Path, **environment: str) -> bool:
        """Run one process and keep the JSON that it writes under its name in the report. True if it succeeded."""
        began = self.now()
        if self.left_s() < 10:
            self.report.put(part, **{name: {"outcome": "no time was left"}})
            return False

        def news() -> None:
            figures: dict[str, Any] = {"seconds": round(self.now() - began, 1)}
            with contextlib.suppress(OSError, ValueError):  # not there yet, or half written
                figures["figures"] = json.loads(result.read_text())
            self.report.put(part, **{name: {"outcome": "running"} | figures})

        code = self.wait([self.start(command, **environment)], limit_s, news)[0]
        outcome = {0: "ok", None: "killed: it hung or took too long"}.get(code, f"exit code {code}")
        entry = self.report.content["parts"][part][name]
        entry["outcome"] = outcome
        self.report.write()
        print(f"  {name}: {outcome}, {self.now() - began:.0f} s", flush=True)
        return code == 0

    def part(self, part: str) -> bool:
        """Run one part within its time limit; True if nothing in it failed."""
        limit_s = PARTS[part]
        if part == "imports":
            return self.imports()
        if part in ("tests", "timed"):
            return self.tests(limit_s, timed=part == "timed")
        if part in BENCHES:
            return self.bench(part, limit_s)
        return self.train(part, limit_s) if part in ("train", "engines") else self.tune(limit_s)

    def imports(self) -> bool:
        missing = {}
        trials = {
            module: subprocess.Popen(
                [sys.executable, "-c", f"import {module}"], stderr=subprocess.PIPE, text=True, env=self.environment
            )
            for module in IMPORTS
        }
        for module, trial in trials.items():
            _, problem = trial.communicate()
            if trial.returncode:
                missing[module] = (problem.strip().splitlines() or ["it died"])[-1]
        self.report.put("imports", outcome=missing or "ok")
        for module, problem in missing.items():
            print(f"  {module}: {problem}")
        if missing:
            print("  Run `make wheels` where the package index can be reached, and copy wheels/ to this machine.")
        return not missing

    def make_data(self) -> Path:
        """Start writing the training data on the CPU while the tests run; returns its folder."""
        folder = self.scratch / "data"
        if self._data is None and not folder.exists():
            script = str(ROOT / "tests" / "gpu_training.py")
            self._data = self.start([sys.executable, script, "--data", str(folder), "--only-data"], CUDA_VISIBLE_DEVICES="")
        return folder

    def tests(self, limit_s: float, *, timed: bool = False) -> bool:
        """All tests in shards; after a crash the process continues with the tests that are not in its log."""
        log, end = self.out / "tests.jsonl", self.now() + min(limit_s, self.left_s())
        files = [str(ROOT / "tests" / name) for name in TESTS if (ROOT / "tests" / name.split("::")[0]).exists()]
        chosen = ["-k", TIMED if timed else f"not {TIMED}"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "gpu_log",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            *chosen,
            *files,
        ]
        shards = 1 if timed else self.jobs
        part = "timed" if timed else "tests"

        def news() -> None:
            entries = read_log(log.read_text().splitlines()) if log.exists() else {}
            names = {name: entry for name, entry in entries.items() if (TIMED in name) == timed}
            bad = {name: entry.get("message", "") for name, entry in names.items() if entry["outcome"] == "failed"}
            unfinished = [name for name, entry in names.items() if entry["outcome"] == "started"]
            passed = sum(entry["outcome"] == "passed" for entry in names.values())
            self.report.content["parts"][part] = {"passed": passed, "failed": bad, "unfinished": unfinished}
            self.report.write()

        again = list(range(shards))
        codes: list[int | None] = []
        while again and self.now() < end - 5:
            running = [
                self.start(command, CHATMILL_TEST_LOG=str(log), CHATMILL_TEST_SHARD=f"{i}/{shards}", CHATMILL_TEST_LIMIT_S="90")
                for i in again
            ]
            codes = self.wait(running, end - self.now(), news)
            # 0: ended; 5: no test was left; 2 to 4: pytest itself failed, and would again; 1 is a test that hung
            again = [i for i, code in zip(again, codes, strict=True) if code is not None and code not in (0, 2, 3, 4, 5)]
        result = self.report.content["parts"].get(part, {})
        print(f"  {result.get('passed', 0)} passed, {len(result.get('failed', ()))} failed, unfinished or hung: ", end="")
        print(len(result.get("unfinished", ())), flush=True)
        for name, message in [*result.get("failed", {}).items(), *((n, "never ended") for n in result.get("unfinished", ()))]:
            print(f"    {name.split('tests/')[-1]}: {' '.join(message.split())[-150:]}", flush=True)
        return bool(result.get("passed")) and not result["failed"] and not result["unfinished"] and set(codes) <= {0, 5}

    def bench(self, part: str, limit_s: float) -> bool:
        kernels, matches = BENCHES[part]
        result = self.scratch / f"{part}.json"
        words = [w for match in matches for w in ("--match", match)]
        command = [sys.executable, "-m", "chatmill.kernels.bench.harness", *kernels, *words, "--json", str(result)]
        return self.run(part, "bench", [*command, "--budget-s", str(min(limit_s, self.left_s()) - 12)], limit_s, result)

    def data_is_made(self, limit_s: float) -> bool:
        """Wait for the training data; False where they could not be made."""
        good = self._data is None or self.wait([self._data], limit_s, lambda: None) == [0]
        self._data = None
        return good

    def train(self, part: str, limit_s: float) -> bool:
        good, end, data = True, self.now() + limit_s, self.make_data()
        if not self.data_is_made(120.0):
            self.report.put(part, data={"outcome": "the training data could not be made: see log.txt"})
            return False
        for name, words in (TRAININGS if part == "train" else ENGINES).items():
            result = self.scratch / f"{name.replace(' ', '-')}.json"
            launcher = [] if part == "train" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
            script = [sys.executable, *launcher, str(ROOT / "tests" / "gpu_training.py")]
            command = [*script, "--data", str(data), "--out", str(result), "--profile", str(self.scratch / "profile"), *words]
            good &= self.run(part, name, command, min(120.0, end - self.now()), result)
            self.keep_profile()
        return good

    def keep_profile(self) -> None:
        folder = self.scratch / "profile"
        if (table := folder / "operators.txt").exists():
            shutil.move(table, self.out / "operators.txt")
        if (trace := folder / "trace-rank0.json").exists():
            with trace.open("rb") as source, gzip.open(self.out / "trace.json.gz", "wb", 6) as target:
                shutil.copyfileobj(source, target)
            trace.unlink()

    def tune(self, limit_s: float) -> bool:
        table = ROOT / "kernels" / "tuning" / "attention.json"
        result = self.scratch / "none.json"
        limit_s = min(limit_s, self.left_s())
        command = [
            sys.executable,
            "-m",
            "chatmill.kernels.bench.harness",
            "attention",
            "--tune",
            "--budget-s",
            str(limit_s - 15),
        ]
        good = self.run("tune", "attention", command, limit_s, result)
        shutil.copy(table, self.out / "attention.json")
        return good


def main() -> int:
    """Run the parts asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--wheels", type=Path, default=Path("wheels"))
    parser.add_argument("--site", type=Path, default=Path(".gpu-site"))
    parser.add_argument("--parts", default="all", help=f"some of {','.join(PARTS)}, or {', '.join(GROUPS)}, or first or second")
    parser.add_argument("--dry", action="store_true", help="rehearse --parts first or second without a GPU")
    parser.add_argument("--budget-s", type=float, default=560.0, help="total seconds; first and second have their own")
    parser.add_argument("--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)), help="number of test processes")
    options = parser.parse_args()
    visit = options.parts if options.parts in ("first", "second") else ""
    sys.path.append(str(ROOT / "tests" / "gpu"))
    if options.dry:
        if not visit:
            parser.error("--dry rehearses a visit: --parts first or --parts second")
        import gpu_dry

        return gpu_dry.rehearse(visit, options.out)
    if visit:
        options.parts = "all"
    asked = [part for word in options.parts.split(",") for part in GROUPS.get(word, (word,))]
    asked = list(dict.fromkeys(asked))
    if unknown := [part for part in asked if part not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)} or {', '.join(GROUPS)}")
    try:
        import torch
    except ImportError:
        print("make gpu: this python has no torch; set GPU_PYTHON to one that has. Nothing was run.")
        return 0
    if not torch.cuda.is_available():
        print(
            "make gpu: no CUDA GPU here, so nothing was run.\n"
            "On a GPU machine this runs the gpu tests, the kernel benchmarks and a short training."
        )
        return 0
    check = Check(options.out, {"first": 560.0, "second": 150.0}.get(visit, options.budget_s), options.jobs)
    try:
        install(options.wheels, options.site)
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # what needs no wheel can still be run
        check.report.content["wheels"] = f"not installed: {error}"
    check.report.content["machine"] = describe(torch)
    check.report.write()
    print(json.dumps(check.report.content["machine"]), flush=True)
    if visit:
        import gpu_visit

        return gpu_visit.run(visit, check)
    outcome: dict[str, bool] = {}
    if "train" in asked or "engines" in asked:
        check.make_data()
    for part in asked:
        print(f"== {part} ({check.left_s():.0f} s left)", flush=True)
        if check.left_s() < 15:
            break
        try:
            outcome[part] = check.part(part)
        except Exception as error:  # an error in this script must not cost the parts that follow
            outcome[part] = False
            check.report.put(part, error=f"{type(error).__name__}: {error}")
            print(f"  {type(error).__name__}: {error}", flush=True)
    shutil.rmtree(check.scratch, ignore_errors=True)
    print((check.out / "summary.txt").read_text(encoding="utf-8"))
    print(json.dumps({part: outcome.get(part, "not begun") for part in asked}))
    return int(not all(outcome.get(part, False) for part in asked))


def end_session(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Kill a process and its children. torchrun ends its workers, which have their own sessions, when asked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def install(wheels: Path, site: Path) -> None:
    """Install the carried packages, once per machine."""
    found = sorted(wheels.glob("*.whl"))
    names = sorted(wheel.name for wheel in found)
    mark = site / "installed.json"
    if found and not (mark.exists() and json.loads(mark.read_text()) == names):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(site), *map(str, found)], check=True)
        mark.write_text(json.dumps(names))


def describe(torch: Any) -> dict[str, object]:
    """Machine and versions, for the header of every result."""
    versions = {}
    for name in (
        "torch",
        "triton",
        "numpy",
        "accelerate",
        "deepspeed",
        "flash-attn",
        "flash-attn-3",
        "flash-attn-4",
        "transformers",
        "pydantic",
        "webdataset",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_properties(0)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu.name,
        "gpus": torch.cuda.device_count(),
        "memory_bytes": gpu.total_memory,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
